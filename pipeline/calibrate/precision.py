"""bfloat16 products where the processor has units for them."""

from __future__ import annotations

import contextlib

import torch
from torch import nn


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


def fast(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor rounded for a product in bfloat16, where that is faster."""
    return tensor.bfloat16() if _has_bfloat16_units() else tensor
