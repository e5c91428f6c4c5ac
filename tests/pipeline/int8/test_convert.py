"""A network whose convolutions are rounded, against the same by torch's own operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.checkpoint.install import install_
from pipeline.checkpoint.modeling_quantized import Int8Conv, RoundedActivation, short_numbers
from pipeline.driving.network import QyolopConfig, QyolopForDrivingPerception
from pipeline.errors import InputError, UsageError
from pipeline.int8.calibrate import activation_grids, observe
from pipeline.int8.convert import (
    WeightRounding,
    as_rounded,
    conv_names,
    folded_kernels,
    int8_entries,
    int8_tensors,
)
from pipeline.int8.runtimes import _INT8_RUNTIMES
from pipeline.int8.structure import ConvStructure
from tests.support.convolutions import images, rounded_small_net, seen_in_small_net, small_net


@pytest.mark.parametrize("runtime", _INT8_RUNTIMES)
def test_a_rounded_network_is_close_to_its_own_and_restored_behind(runtime: str) -> None:
    model, entries, tensors = rounded_small_net(runtime)
    x = images(1, seed=9)[0]
    with torch.no_grad():
        before = model(x)
    with as_rounded(model, entries, tensors), torch.no_grad():
        during = model(x)
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(Int8Conv) == 9
        assert not [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for own, other in zip(before, during, strict=True):
        # Nine roundings to 1 part in 256 of a range, which is some parts of the numbers' own size.
        assert 0 < float((own - other).square().mean()) < 2e-3 * float(own.square().mean())
    assert all(torch.equal(a, b) for a, b in zip(before, model(x), strict=True))


@pytest.mark.parametrize(("runtime", "bits"), [("tensorrt", 8), ("cpu", 8), ("tensorrt", 5)])
def test_folding_changes_nothing_and_rounding_is_a_convolution_of_whole_numbers(
    runtime: str, bits: int
) -> None:
    model, entries, tensors = rounded_small_net(runtime, bits, ["last.0"])
    own = model.get_submodule("last.0"), model.get_submodule("last.1")
    weight, bias = folded_kernels(model, entries)["last.0"]
    x = 3 * torch.rand(2, 16, 5, 7)
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=1), own[1](own[0](x)))
    install_(model, entries, tensors)
    conv: Any = model.get_submodule("last.0")
    assert conv.kernel.abs().max() <= 2 ** (bits - 1) - 1
    scale, zero = conv.input.scale.double(), int(conv.input.zero_point)
    codes = conv.input.codes.of(x, conv.input.scale, zero).double() - zero
    # In whole numbers, as an integer unit would, and only then times the scales.
    sums = F.conv2d(codes, conv.kernel.double(), padding=1)
    scales = short_numbers(conv.scales).double()[:, None, None]
    units = (scales * scale).flatten()
    assert torch.equal(conv(x).double(), sums * scales * scale + conv.bias.double()[:, None, None])
    assert bool(((conv.bias.double() - bias).abs() <= units / 2).all())
    assert torch.equal(conv.bias.double() / units, (conv.bias.double() / units).round())


def test_tensorrt_rounds_what_convolutions_read_and_the_cpu_what_arises() -> None:
    model, entries, tensors = rounded_small_net("tensorrt")
    assert {e["form"] for e in entries.values()} == {"conv", "folded"}
    assert all(entries[name]["input"] == "int8" for name in conv_names(entries))
    assert all(entries[name]["output"] is None for name in conv_names(entries))
    model, entries, tensors = rounded_small_net("cpu")
    direct = [name for name in conv_names(entries) if entries[name]["input"] is None]
    assert direct == ["left.0", "right.0", "plain", "boxes", "mask"]
    install_(model, entries, tensors)
    assert isinstance(model.relu, RoundedActivation)
    assert model.boxes.output is model.mask.output is None


def test_a_convolution_that_stays_float_keeps_its_norm_and_its_input() -> None:
    model, entries, tensors = rounded_small_net("cpu", convs=["stem.0", "last.0"])
    install_(model, entries, tensors)
    assert isinstance(model.get_submodule("merge.1"), torch.nn.BatchNorm2d)
    assert type(model.get_submodule("left.2")) is torch.nn.ReLU
    assert isinstance(model.get_submodule("merge.2"), RoundedActivation)  # `last` reads it


@pytest.mark.parametrize("runtime", _INT8_RUNTIMES)
def test_casts_of_the_model_leave_codes_and_scales_alone(runtime: str) -> None:
    model, entries, tensors = rounded_small_net(runtime)
    install_(model, entries, tensors)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.half()
    x = images(1)[0].half()
    assert all(output.dtype == torch.float16 for output in model(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_buffers())


def test_the_network_of_driving_is_rounded_whole_but_for_what_its_heads_give() -> None:
    torch.manual_seed(0)
    model = QyolopForDrivingPerception(QyolopConfig((32, 64), 4))
    batches = [torch.rand(4, 3, 32, 64) for _ in range(2)]
    with torch.no_grad():
        for batch in 10 * batches:  # norms that know their inputs
            model(batch)
    model.eval()
    row = _INT8_RUNTIMES["cpu"]
    structure = ConvStructure.of(model, batches[0])
    assert len(structure.convs) == 65
    assert sum(site.norm is not None for site in structure.convs.values()) == 60
    grids = activation_grids(observe(model, structure, batches), row)
    entries = int8_entries(structure, grids, row, WeightRounding())
    tensors = int8_tensors(entries, grids, folded_kernels(model, entries), WeightRounding())
    heads = [name for name in conv_names(entries) if structure.convs[name].norm is None]
    assert len(heads) == 5
    with torch.no_grad():
        own = model(batches[0])
    with as_rounded(model, entries, tensors), torch.no_grad():
        assert all(model.get_submodule(name).output is None for name in heads)
        other = model(batches[0])
    for a, b in zip(own.boxes, other.boxes, strict=True):
        assert float((a - b).square().mean()) < 1e-3 * float(a.square().mean())


def test_calibration_needs_batches_and_a_known_observer() -> None:
    model, batches = small_net(), images(1)
    structure = seen_in_small_net()[0]
    with pytest.raises(InputError, match="nothing to calibrate on"):
        observe(model, structure, [])
    with pytest.raises(UsageError, match="no such way"):
        activation_grids({}, _INT8_RUNTIMES["cpu"], observer="entropy")
    with pytest.raises(InputError, match="not finite"):
        observe(model, structure, [batches[0] / 0])


def test_one_range_holds_every_tensor_of_a_grid() -> None:
    model, batches = small_net(), images(3)
    structure, seen = seen_in_small_net()
    largest: dict[int, float] = {}
    for name, number in structure.activations.items():
        handle = model.get_submodule(name).register_forward_hook(
            lambda m, i, o, n=number: largest.update({n: max(largest.get(n, 0.0), o.max().item())})
        )
        for batch in batches:
            model(batch)
        handle.remove()
    assert {n: seen[n].high for n in largest} == pytest.approx(largest)
