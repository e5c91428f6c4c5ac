"""bfloat16 products where the processor has units for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F


def _has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fast_products(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """A context in which linears multiply in bfloat16, and all else stays in float32.

    For a float32 model only where that is faster; a model held in half precision, which meets the
    float32 residual stream of the calibration, always needs it.
    """
    parameter = next(model.parameters())
    if parameter.device.type == "cpu" and (
        parameter.dtype != torch.float32 or _has_bfloat16_units()
    ):
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def fast_steps(model: nn.Module) -> Iterator[bool]:
    """Inside, linears of a float32 model multiply in bfloat16 where that is faster.

    For many calls of few tokens: weights are rounded once, for all of them. All else stays in
    float32, attention too: one query at a time it takes several times as long in bfloat16.

    Yields:
        Whether anything is rounded.
    """
    parameter = next(model.parameters())
    is_faster = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
    if not (is_faster and _has_bfloat16_units()):
        yield False
        return
    rounded: dict[int, torch.Tensor] = {}  # tied matrices once

    def forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        key = id(linear.weight)
        if key not in rounded:
            rounded[key] = linear.weight.detach().bfloat16()
        y = F.linear(x.bfloat16(), rounded[key]).float()
        return y if linear.bias is None else y + linear.bias

    with patch.object(nn.Linear, "forward", forward):
        yield True


def fast(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor rounded for a product in bfloat16, where that is faster."""
    return tensor.bfloat16() if _has_bfloat16_units() else tensor
