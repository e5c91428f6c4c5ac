"""Rounding to codes: torch's own operators and ONNX Runtime's are the references."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from pipeline.checkpoint.modeling_quantized import Codes
from pipeline.int8.grids import ActivationGrid, fake_quantize


def onnx_rounded(x: torch.Tensor, scale: float, zero: int, kind: str) -> np.ndarray:
    """Through QuantizeLinear and DequantizeLinear of ONNX Runtime."""
    dtype = TensorProto.INT8 if kind == "int8" else TensorProto.UINT8
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("z", dtype, [], [zero]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(None, {"x": x.numpy()})[0]
    return found


@pytest.mark.parametrize(
    ("kind", "zero"), [("int8", 0), ("uint8", 0), ("uint8", 128), ("uint8", 255)]
)
@pytest.mark.parametrize("scale", [0.25, 0.1, 0.0317, 1e-30, 3e4])
def test_rounding_is_that_of_onnx_runtime_at_ties_and_beyond_the_range(
    kind: str, zero: int, scale: float
) -> None:
    exact = float(np.float32(scale))
    steps = torch.arange(-300, 301).float() / 2  # every second one is a tie
    random = 100 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x = torch.cat((steps, random, torch.tensor([1e9, -1e9, -0.0]))) * exact
    ours = ActivationGrid(Codes.parse(kind), exact, zero).rounded(x)
    np.testing.assert_array_equal(ours.numpy(), onnx_rounded(x, exact, zero, kind))


def test_a_scale_of_a_power_of_two_gives_what_torch_gives() -> None:
    # Others multiply with 1 / scale, which is exact for these alone.
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    ours = ActivationGrid(Codes.parse("uint8"), 2.0**-6, 100).rounded(x)
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, 2.0**-6, 100, 0, 255))
    scales = 2.0 ** -torch.arange(4.0, 8.0)
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros(4, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -127, 127)
    codes = Codes(8, narrow=True)
    assert torch.equal(codes.rounded(weight, scales[:, None, None, None]), theirs)


def test_training_rounds_as_inference_does_and_passes_gradients_within_the_range() -> None:
    torch.manual_seed(3)
    x = (10 * torch.randn(2000)).requires_grad_()
    scale = torch.tensor(0.07, requires_grad=True)
    codes = Codes.parse("int8")
    rounded = fake_quantize(x, scale, 0, codes)
    assert torch.equal(rounded, codes.rounded(x.detach(), scale.detach()))
    upstream = torch.randn(2000)
    rounded.backward(upstream)
    steps = x.detach() / 0.07
    inside = (steps.round() >= -128) & (steps.round() <= 127)
    torch.testing.assert_close(x.grad, torch.where(inside, upstream, 0.0))  # times s, over s
    # Esser et al., equation 3.
    slope = torch.where(inside, steps.round() - steps, steps.round().clamp(-128, 127))
    torch.testing.assert_close(scale.grad, (slope * upstream).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("int8", -128, 127), ("uint8", 0, 255), ("int4", -8, 7)]
)
def test_names_of_codes_say_their_range(name: str, low: int, high: int) -> None:
    codes = Codes.parse(name)
    assert (codes.name, codes.low, codes.high) == (name, low, high)
    assert Codes(codes.bits, narrow=True).low == -(2 ** (codes.bits - 1) - 1)


@pytest.mark.parametrize("name", ["int9", "int1", "float8", "8", "uint", "int-4"])
def test_other_codes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no codes"):
        Codes.parse(name)
