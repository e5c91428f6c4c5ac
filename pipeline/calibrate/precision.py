"""bfloat16 products where the processor has units for them."""

from __future__ import annotations

import contextlib

import torch
from torch import nn


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fast_products(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """A context in which the linears of a float32 model multiply in bfloat16, where that is faster.

    Norms, softmax and the residual stream stay in float32.
    """
    device = next(model.parameters()).device
    if device.type == "cpu" and has_bfloat16_units():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()
