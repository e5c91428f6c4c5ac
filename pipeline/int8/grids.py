"""Codes and what they stand for, x = (code - zero point) * scale, and gradients through rounding.

Tensors in, tensors out. Rounding is ONNX's QuantizeLinear: divide by the scale, round halves to
even, add the zero point, saturate.

Scales are short: three significant bits. A product of two values is then a whole number times a
unit that all products of an output share, and float32 adds those without rounding, as long as sums
stay below 2^18 units: whatever the order in which a library adds, PyTorch and ONNX give the same
bits. With scales of 24 bits the last bits differ, now and then a code with them, and then all that
follows. A range is held to within a quarter, a tenth on average, which costs a tenth of a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint.modeling_quantized import Codes

_STEPS = 8  # of an octave's upper end: mantissas are 4/8, 5/8, 6/8 and 7/8
_SMALLEST_SCALE = 2.0**-100
_MOST_UNITS = 2**17  # of a bias


def short_scale(scale: torch.Tensor) -> torch.Tensor:
    """The next larger numbers of three significant bits; never 0, by which nothing is divided.

    Args:
        scale: at least 0, any shape.

    Returns:
        Float32, of its shape; its gradient is that of the scale.
    """
    mantissa, exponent = torch.frexp(scale.detach().double().clamp_min(_SMALLEST_SCALE))
    short = torch.ldexp((mantissa * _STEPS).ceil() / _STEPS, exponent).float()
    return _Instead.apply(scale, short) if scale.requires_grad else short  # type: ignore[no-untyped-call]


def with_bias(
    scales: torch.Tensor, bias: torch.Tensor, step: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of a kernel, and its bias in the units in which its sums are; with gradients.

    A kernel that is small beside its bias takes larger steps, so that their sum is exact.

    Args:
        scales: short, float32 [m].
        bias: float32 [m].
        step: scale of what the convolution reads, short, float32 [].

    Returns:
        Scales, and the bias as whole multiples of step * scale, float32 [m].
    """
    scales = torch.maximum(scales, short_scale(bias.detach().abs() / (step.detach() * _MOST_UNITS)))
    unit = step * scales
    return scales, _Round.apply(bias / unit) * unit  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class ActivationGrid:
    """The values that an activation may take.

    Attributes:
        codes: how many there are.
        scale: between neighbours; a number of float32.
        zero: the code of 0.
    """

    codes: Codes
    scale: float
    zero: int = 0

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest values of a tensor, of its shape."""
        return self.codes.rounded(x, torch.tensor(self.scale, dtype=x.dtype), self.zero)


class _Instead(torch.autograd.Function):
    """Other numbers in the place of a tensor, whose gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, instead: torch.Tensor) -> torch.Tensor:
        return instead.view_as(instead)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class _Round(torch.autograd.Function):
    """Round halves to even; the gradient passes as if nothing was rounded (1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero: int, codes: Codes) -> torch.Tensor:
    """The nearest values of a grid, with gradients for numbers and for the scale.

    Forwards it is `Codes.rounded`, bit for bit. Backwards a number within the range passes its
    gradient on, one beyond passes none; the scale's is that of learned step sizes (1902.08153):
    the rounding error where a number is within the range, the outermost code where it is beyond.

    Args:
        x: float, any shape.
        scale: float32, of a shape that x broadcasts with.
        zero: the code of 0.
        codes: of the grid.

    Returns:
        Float, of the shape of x.
    """
    placed = _Round.apply(x / scale) + zero  # type: ignore[no-untyped-call]
    return (placed.clamp(codes.low, codes.high) - zero) * scale
