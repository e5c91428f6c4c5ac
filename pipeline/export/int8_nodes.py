"""Convolutions in 8 bits as QuantizeLinear and DequantizeLinear, which every runtime reads.

Kernels are a byte a number: DequantizeLinear (codes, a scale for each output) -> Conv. Biases stay
float, since TensorRT refuses them as int32 codes, and ONNX Runtime rounds them by itself. What is
rounded is rounded where the checkpoint says, and nowhere else.

Kernels of fewer bits are bytes here, too: of ONNX's 4-bit types TensorRT for RTX 1.7 builds no
convolution, and ONNX Runtime 1.32 multiplies them as floats. Activations of fewer bits have no
graph: there is no type of 6 bits, and ONNX Runtime's optimiser makes those of 4 invalid.

Beside unsigned activations kernels are written unsigned, too, counted from 128: they are the same
numbers. On processors without VNNI, ONNX Runtime multiplies unsigned with signed bytes in sums of
16 bits, which saturate without a word; unsigned with unsigned is right everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import nn

from pipeline.checkpoint.modeling_quantized import ActivationRounding, Int8Conv, short_numbers
from pipeline.export.contract import DEQUANTIZE
from pipeline.int8.runtimes import int8_runtime

_QUANTIZE = "QuantizeLinear"
# The first opset of DequantizeLinear with an axis.
_VERSION = 13
_SCALE, _ZERO, _CODES = "scale_number", "zero_code", "kernel_codes"
_MIDDLE = 128  # what unsigned kernels are counted from


def require_int8_runtime(model: nn.Module, runtime: str, where: object) -> None:
    """Refuse a network whose activations were rounded for another runtime.

    A network without rounded activations is any runtime's.

    Args:
        model: with its scales and zero points.
        runtime: that the graph is for.
        where: for the message.

    Raises:
        InputError: the runtime would compute in float, or other numbers without a word.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, ActivationRounding)]
    if found:
        grids = ((name, module.codes, int(module.zero_point)) for name, module in found)
        int8_runtime(runtime).require(grids, where)


@contextmanager
def int8_as_nodes(model: nn.Module) -> Iterator[None]:
    """Inside, torch.onnx.export writes rounding and kernels of a byte as nodes of ONNX.

    Args:
        model: its scales are given names of their own meanwhile, as the numbers that they are.
    """
    roundings = [m for m in model.modules() if isinstance(m, ActivationRounding)]
    middle = _MIDDLE if any(not m.codes.signed for m in roundings) else 0
    kind = torch.uint8 if middle else torch.int8
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ActivationRounding):
                own = torch.int8 if module.codes.signed else torch.uint8
                _lend(stack, module, _SCALE, module.scale)
                _lend(stack, module, _ZERO, module.zero_point.to(own))
            elif isinstance(module, Int8Conv):
                zeros = torch.full_like(module.scales, middle, dtype=kind)
                _lend(stack, module, _SCALE, short_numbers(module.scales))
                _lend(stack, module, _ZERO, zeros)
                _lend(stack, module, _CODES, (module.kernel.to(torch.int16) + middle).to(kind))
        stack.enter_context(patch.object(ActivationRounding, "forward", _rounded))
        stack.enter_context(patch.object(Int8Conv, "forward", _convolved))
        yield


def _lend(stack: ExitStack, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module.register_buffer(name, tensor, persistent=False)
    stack.callback(delattr, module, name)


def _rounded(self: ActivationRounding, x: torch.Tensor) -> torch.Tensor:
    x, kind = x.float(), self.get_buffer(_ZERO).dtype
    parameters = (self.get_buffer(_SCALE), self.get_buffer(_ZERO))
    codes = torch.onnx.ops.symbolic(
        _QUANTIZE, (x, *parameters), dtype=kind, shape=x.shape, version=_VERSION
    )
    return torch.onnx.ops.symbolic(
        DEQUANTIZE, (codes, *parameters), dtype=torch.float32, shape=x.shape, version=_VERSION
    )


def _convolved(self: Int8Conv, x: torch.Tensor) -> torch.Tensor:
    weight = torch.onnx.ops.symbolic(
        DEQUANTIZE,
        (self.get_buffer(_CODES), self.get_buffer(_SCALE), self.get_buffer(_ZERO)),
        {"axis": 0},
        dtype=torch.float32,
        shape=self.shape,
        version=_VERSION,
    )
    return self.convolved(x, weight)
