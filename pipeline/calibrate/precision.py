"""Quick products: bfloat16 where the processor has units for it, float32 by the quicker library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.machine import cpu_flags, is_of_amd


def _has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@contextlib.contextmanager
def quick_float32() -> Iterator[None]:
    """Inside, float32 products on a CPU of AMD are oneDNN's, which are 1.2 to 2.8 times MKL's.

    oneDNN is asked by allowing it bfloat16, of which it makes use with AMX alone, which no
    processor of AMD has: products stay float32's, and a test holds that. With one row MKL is
    quicker.
    """
    onednn: Any = torch.backends.mkldnn
    own = onednn.matmul.fp32_precision
    if is_of_amd() and not torch.cpu._is_amx_tile_supported():
        onednn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        onednn.matmul.fp32_precision = own


@contextlib.contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Inside, linears multiply in bfloat16, and all else stays in float32.

    For a float32 model only where that is faster; a model held in half precision, which meets the
    float32 residual stream of the calibration, always needs it.
    """
    parameter = next(model.parameters())
    with contextlib.ExitStack() as inside:
        if parameter.device.type == "cpu":
            inside.enter_context(fast_products_of(parameter.dtype))
        yield


@contextlib.contextmanager
def fast_products_of(dtype: torch.dtype) -> Iterator[None]:
    """The same for a model on the CPU that is held in this type."""
    with contextlib.ExitStack() as inside:
        inside.enter_context(quick_float32())
        if dtype != torch.float32 or _has_bfloat16_units():
            inside.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


@contextlib.contextmanager
def fast_steps(model: nn.Module) -> Iterator[bool]:
    """Inside, linears of a float32 model multiply in bfloat16 where that is faster.

    For many calls of few tokens: weights are laid out once as the products read them, rounded or
    not, for all of them (rounded, of 16 tokens: half the time, of 130: nine tenths; in float32 with
    AVX2, of 16 to 33 tokens: two thirds, of the LM head half). All else stays in float32, attention
    too: one query at a time it takes several times as long in bfloat16.

    Yields:
        Whether anything is rounded.
    """
    parameter = next(model.parameters())
    rounds = _has_bfloat16_units()
    is_plain = parameter.dtype == torch.float32 and parameter.device.type == "cpu"
    if not (is_plain and (rounds or _lays_out(torch.float32))):
        yield False
        return
    laid_out: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}  # tied matrices once
    dtype = torch.bfloat16 if rounds else torch.float32

    def forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        key = id(linear.weight)
        if key not in laid_out:
            laid_out[key] = _product_with(linear.weight.detach().to(dtype))
        y = laid_out[key](x.to(dtype)).float()
        return y if linear.bias is None else y + linear.bias

    with patch.object(nn.Linear, "forward", forward):
        yield rounds


def _lays_out(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out matrices of this type for its products."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float32:
        return "avx2" in cpu_flags()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product_with(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Products with W, float32 or bfloat16 [m, n], that oneDNN lays out once where it can."""
    if not _lays_out(weight.dtype):
        return lambda x: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def fast(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor rounded for a product in bfloat16, where that is faster."""
    return tensor.bfloat16() if _has_bfloat16_units() else tensor
