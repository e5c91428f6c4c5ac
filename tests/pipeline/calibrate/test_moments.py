from __future__ import annotations

import pytest
import torch

from pipeline.calibrate import precision
from pipeline.calibrate.moments import (
    _LARGEST_NORM,
    BLOCK,
    Balanced,
    GroupMoments,
    OutputMoments,
    SecondMoment,
    _gram,
    _OutputMoment,
)


def relative_error(moment: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(moment - exact) / torch.linalg.norm(exact))


@pytest.mark.parametrize("batches", [1, 400])
def test_the_error_does_not_grow_with_the_number_of_batches(batches: int) -> None:
    torch.manual_seed(0)
    # Not centred, so that the sum keeps growing and a float32 sum would lose digits.
    inputs = torch.randn(batches, 10, 24) + 3.0
    moment = SecondMoment(24)
    plain = torch.zeros(24, 24)
    for batch in inputs:
        moment.add_(batch)
        plain += batch.T @ batch
    rows = inputs.reshape(-1, 24).double()
    exact = rows.T @ rows
    # A float32 product of ten terms: a few units of 2^-24, less after averaging.
    assert relative_error(moment.total, exact) < 2e-7
    assert moment.total.dtype == torch.float64
    if batches > 1:
        assert relative_error(moment.total, exact) < relative_error(plain.double(), exact)


def test_leading_dimensions_are_tokens() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 5, 8)
    moment = SecondMoment(8)
    moment.add_(inputs)
    rows = inputs.reshape(30, 8).double()
    assert moment.tokens == 30
    assert torch.allclose(moment.mean(), rows.T @ rows / 30, atol=1e-6)


def test_half_precision_inputs_are_not_multiplied_in_half_precision() -> None:
    inputs = torch.full((100, 4), 300.0, dtype=torch.float16)
    moment = SecondMoment(4)
    moment.add_(inputs)
    assert torch.equal(moment.mean(), torch.full((4, 4), 9e4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_not_added(bad: float) -> None:
    moment = SecondMoment(4)
    moment.add_(torch.ones(3, 4))
    inputs = torch.ones(3, 4)
    inputs[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        moment.add_(inputs)
    assert moment.tokens == 3
    assert torch.equal(moment.total, torch.full((4, 4), 3.0, dtype=torch.float64))


def test_opposite_infinities_do_not_cancel() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        SecondMoment(2).add_(torch.tensor([[float("inf"), -float("inf")]]))


def test_a_mean_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        SecondMoment(4).mean()


@pytest.mark.parametrize("width", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 45])
def test_a_product_of_blocks_is_the_whole_product(width: int) -> None:
    # Small integers, of which float32 sums are exact.
    rows = torch.randint(-8, 9, (50, width), generator=torch.Generator().manual_seed(0)).float()
    product = _gram(rows)
    assert product.dtype == torch.float32
    assert torch.equal(product, rows.T @ rows)


def test_a_product_in_bfloat16_is_accurate_to_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    means = []
    for fast_units in (False, True):
        monkeypatch.setattr(
            precision, "_has_bfloat16_units", lambda fast_units=fast_units: fast_units
        )
        moment = _OutputMoment(12)
        moment.add_(gradients)
        means.append(moment.mean())
    exact, fast = means
    # 2^-9 for the rounding of each factor, more where the product itself is rounded to bfloat16.
    assert relative_error(fast, exact) < 2**-7


def with_one_long(length: float) -> torch.Tensor:
    """999 gradients of length one and one of another length."""
    gradients = torch.zeros(1000, 4)
    gradients[:, 0] = 1
    gradients[0] = torch.tensor([0.0, length, 0.0, 0.0])
    return gradients


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)


@pytest.mark.usefixtures("exact_products")
def test_an_output_moment_of_ordinary_gradients_is_their_second_moment() -> None:
    gradients = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    moment = _OutputMoment(6)
    weights = moment.add_(gradients)
    rows = gradients.reshape(15, 6).double()
    torch.testing.assert_close(moment.mean().double(), rows.T @ rows / 15, rtol=1e-5, atol=1e-6)
    squares = rows.square().sum(1)
    torch.testing.assert_close(weights.double(), squares / squares.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("exact_products")
def test_a_gradient_far_longer_than_the_rest_is_cut() -> None:
    moment = _OutputMoment(4)
    weights = moment.add_(with_one_long(1e4))
    mean_square = (999 + 1e8) / 1000
    limit = _LARGEST_NORM**2 * mean_square
    assert moment.total[1, 1].item() == pytest.approx(limit, rel=1e-5)
    assert moment.total[0, 0].item() == pytest.approx(999, rel=1e-5)
    assert weights[0].item() == pytest.approx(_LARGEST_NORM**2, rel=1e-5)
    assert weights[1].item() == pytest.approx(1 / mean_square, rel=1e-5)


@pytest.mark.usefixtures("exact_products")
def test_a_gradient_that_is_not_so_long_is_not_cut() -> None:
    # Ten times the root mean square would be about 10.5.
    moment = _OutputMoment(4)
    moment.add_(with_one_long(10.0))
    assert moment.total[1, 1].item() == pytest.approx(100, rel=1e-5)


def test_gradients_that_are_all_zero_have_a_moment_of_zero() -> None:
    moment = _OutputMoment(4)
    weights = moment.add_(torch.zeros(3, 4))
    assert torch.equal(moment.mean(), torch.zeros(4, 4))
    assert torch.equal(weights, torch.zeros(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused_and_not_added(bad: float) -> None:
    moment = _OutputMoment(2)
    with pytest.raises(ValueError, match="NaN or infinite gradients"):
        moment.add_(torch.tensor([[1.0, bad]]))
    assert moment.tokens == 0
    with pytest.raises(ValueError, match="no tokens"):
        moment.mean()


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("members", [1, 3])
def test_the_weighted_moment_weights_each_token_by_its_squared_gradients(members: int) -> None:
    generator = torch.Generator().manual_seed(0)
    names = [f"linear{i}" for i in range(members)]
    moments = GroupMoments(6, dict.fromkeys(names, 4))
    weighted = torch.zeros(6, 6, dtype=torch.float64)
    plain = torch.zeros(6, 6, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(2, 5, 6, generator=generator)
        moments.see_input(x)
        rows, weights = x.reshape(10, 6).double(), torch.zeros(10, dtype=torch.float64)
        # Backward reaches the members in the opposite order.
        for name in reversed(names):
            gradients = torch.randn(2, 5, 4, generator=generator)
            moments.see_gradient(name, gradients)
            squares = gradients.reshape(10, 4).double().square().sum(1)
            weights += squares / squares.mean() / members
        for row, weight in zip(rows, weights, strict=True):
            plain += torch.outer(row, row)
            weighted += weight * torch.outer(row, row)
    torch.testing.assert_close(moments.inputs.total, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.weighted.total, weighted, rtol=1e-5, atol=1e-5)
    assert moments.weighted.tokens == moments.inputs.tokens == 30


def test_balanced_moments_have_the_trace_of_the_plain_one_and_half_of_each() -> None:
    rows, others = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0)).double()
    plain, weighted = rows.T @ rows, 1e3 * others.T @ others
    both = Balanced(plain, weighted).double()
    assert both.trace().item() == pytest.approx(plain.trace().item(), rel=1e-12)
    scaled = weighted * (plain.trace() / weighted.trace())
    torch.testing.assert_close(both, (plain + scaled) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Balanced(plain, 7 * plain).double(), plain, rtol=1e-12, atol=1e-12)


def test_what_varies_little_about_a_large_mean_is_not_lost_in_it() -> None:
    """Nearly all of what keys are is their mean; float32 products of it leave nothing below 1e-3.

    A covariance that has lost its smallest direction rounds all the others 200 times worse.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -3, 24)
    mixing = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    mean = 100 * torch.randn(24, generator=generator)
    moments, rows = OutputMoments(24), []
    for _ in range(8):
        rows.append((torch.randn(200, 24, generator=generator) * spread) @ mixing + mean)
        moments.see_output(rows[-1])
        moments.see_gradient(torch.randn(200, 24, generator=generator))
    seen = torch.cat(rows).double()
    moment, weighted, found = moments.centred()
    exact = torch.cov(seen.T, correction=0)
    whitened = torch.linalg.inv(torch.linalg.cholesky(exact))
    torch.testing.assert_close(found, seen.mean(0), rtol=1e-9, atol=1e-9)
    for own, tolerance in ((moment, 0.01), (weighted, 0.5)):
        values = torch.linalg.eigvalsh(whitened @ own @ whitened.T)
        assert (values - 1).abs().max() < tolerance


def test_moments_seen_in_a_forward_pass_in_bfloat16_are_those_of_float32() -> None:
    rows = torch.randn(1, 64, 24) * torch.logspace(0, -3, 24)
    found = []
    for rounds in (False, True):
        group, outputs = GroupMoments(24, {"a": 24}), OutputMoments(24)
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            group.see_input(rows)
            outputs.see_output(rows)
        group.see_gradient("a", rows)
        outputs.see_gradient(rows)
        found.append([group.inputs.mean(), group.weighted.mean(), *outputs.centred()])
        assert float(torch.linalg.eigvalsh(group.inputs.mean())[0]) > 0
    assert all(map(torch.equal, *found))
