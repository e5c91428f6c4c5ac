"""Grids of what was seen, against torch's own observers and against a search of every range."""

from __future__ import annotations

import pytest
import torch
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from pipeline.checkpoint.modeling_quantized import Codes
from pipeline.errors import InputError
from pipeline.int8.grids import short_scale
from pipeline.int8.ranges import OBSERVERS, Observer, _grid_of, weight_scales

INT8, UINT8 = Codes.parse("int8"), Codes.parse("uint8")


def seen(*tensors: torch.Tensor) -> Observer:
    observer = Observer("x")
    for tensor in tensors:
        observer.see(tensor)
    for tensor in tensors:
        observer.count(tensor)
    return observer


def normal(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", [0.0, 0.7, 9.0])
def test_the_affine_grid_of_extremes_is_that_of_torch_shortened(shift: float) -> None:
    x = normal(1000) + shift
    theirs = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    theirs(x)
    scale, zero = theirs.calculate_qparams()
    grid = OBSERVERS["min-max"](seen(x[:300], x[300:]), UINT8, False)
    # Ours is the next scale of three bits, which moves the zero point in proportion.
    assert float(scale) <= grid.scale < 1.25 * float(scale)
    assert grid.zero == pytest.approx(float(zero) * float(scale) / grid.scale, abs=1)


def test_weights_have_the_scales_of_torch_shortened() -> None:
    weight = normal(6 * 4 * 9).view(6, 4, 3, 3) * torch.arange(1.0, 7.0)[:, None, None, None]
    theirs = PerChannelMinMaxObserver(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
    theirs(weight)
    narrow = Codes(8, narrow=True)
    exact = theirs.calculate_qparams()[0]
    torch.testing.assert_close(weight_scales(weight, narrow), short_scale(exact))
    one = weight_scales(weight, narrow, per_channel=False)
    assert torch.equal(one, short_scale(weight.abs().max() / 127).expand(6))


def test_a_symmetric_grid_holds_both_ends() -> None:
    grid = _grid_of(-2.0, 1.0, INT8, True)
    assert grid.zero == 0
    ends = grid.rounded(torch.tensor([-2.0, 1.0])).tolist()
    assert ends == pytest.approx([-2.0, 1.0], abs=grid.scale / 2)


def test_zero_is_on_every_grid() -> None:
    for low, high in ((-3.0, 0.0), (-0.01, 5.0), (0.0, 1.0), (-7.0, 0.3)):
        grid = _grid_of(low, high, UINT8, False)
        assert float(grid.rounded(torch.zeros(()))) == 0.0


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tensor_of_zeros_has_a_grid(name: str, symmetric: bool) -> None:
    codes = INT8 if symmetric else UINT8
    grid = OBSERVERS[name](seen(torch.zeros(10)), codes, symmetric)
    assert grid.scale == 1.0
    assert torch.equal(grid.rounded(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_least_squares_errs_least_on_the_numbers_themselves(symmetric: bool, bits: int) -> None:
    codes = Codes(bits, signed=symmetric)
    x = torch.cat((normal(50000), torch.tensor([40.0, -25.0])))
    observer = seen(x)

    def error(name: str) -> float:
        grid = OBSERVERS[name](observer, codes, symmetric)
        return float((grid.rounded(x) - x).square().mean())

    assert error("mse") <= 1.001 * min(error("min-max"), error("percentile"))
    if bits == 4:
        assert error("mse") < 0.2 * error("min-max")


def test_percentiles_leave_one_number_in_ten_thousand_outside() -> None:
    x = normal(200_000).abs()
    grid = OBSERVERS["percentile"](seen(x), UINT8, False)
    outside = int((x > grid.scale * 255).sum())
    assert 0 < outside <= 40  # 20 expected; a bin of the histogram holds a few
    assert grid.zero == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        Observer("stem").see(torch.tensor([1.0, bad]))
    with pytest.raises(InputError, match="not finite"):
        weight_scales(torch.tensor([[1.0, bad]]), INT8)


def test_dead_channels_have_a_scale() -> None:
    weight = torch.stack((torch.zeros(9), torch.ones(9)))
    for squares in (False, True):
        scales = weight_scales(weight, Codes(8, narrow=True), squares=squares)
        assert scales[0] > 0
        codes = Codes(8, narrow=True).of(weight, scales[:, None])
        assert torch.equal(codes[0], torch.zeros(9))
        assert codes[1].min() >= 0.8 * 127


def test_clipped_weights_of_four_bits_err_less() -> None:
    weight = normal(8 * 500).view(8, 500)
    codes = Codes(4, narrow=True)

    def error(squares: bool) -> torch.Tensor:
        scales = weight_scales(weight, codes, squares=squares)[:, None]
        return (codes.rounded(weight, scales) - weight).square().sum(1)

    assert bool((error(True) < error(False)).all())


def test_scales_are_the_next_of_three_bits() -> None:
    x = torch.rand(10000, generator=torch.Generator().manual_seed(4)) * 10 ** torch.linspace(
        -20, 20, 10000
    )
    short = short_scale(x)
    assert bool((short >= x).all())
    assert bool((short <= 1.25 * x).all())
    assert set((torch.frexp(short)[0] * 8).tolist()) == {4.0, 5.0, 6.0, 7.0}
    assert torch.equal(short_scale(short), short)
    assert float(short_scale(torch.zeros(()))) > 0
