"""Attention and its mask in the form that both ONNX Runtime and TensorRT take.

Registered with transformers under one name, so that every architecture that supports its
attention interface is traced with them, whatever its masks (causal, sliding window) are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from pipeline.export.cache import GraphCache
from pipeline.export.profile import Profile

NAME = "skipcat_export"
# transformers calls the functions below with no place for our own arguments.
active_cache: ContextVar[GraphCache] = ContextVar("active_cache")


def mask_from_slots(
    *,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    **unused: Any,
) -> torch.Tensor:
    """Additive mask, float [B, 1, S, K]: 0 where a query may look, very negative elsewhere.

    Args:
        kv_length: K.
        mask_function: (batch, head, query slot, key slot) -> allowed; causal, sliding, ...
        attention_mask: [B, T], T tokens so far or any padding of them.
        dtype: of the mask.
        unused: what else transformers passes.
    """
    cache = active_cache.get()
    keys = torch.arange(kv_length)
    allowed = mask_function(0, 0, cache.slots[:, None, :, None], keys[None, None, None, :])
    if cache.profile.static_cache:
        # Slots behind the end of the mask lie in the future of every query, so any value will do.
        keys = keys.clamp(max=attention_mask.shape[1] - 1)
    present = attention_mask.index_select(1, keys)[:, None, None, :].bool()
    # Not -inf, and not so low that a score added to it becomes -inf in half precision: a row with
    # nothing to look at (padding) would turn into NaN, and poison the cache.
    closed = torch.finfo(dtype).min / 2
    return torch.where(
        allowed & present, torch.zeros((), dtype=dtype), torch.full((), closed, dtype=dtype)
    )


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling Q K^T + mask) V; query [B, H, S, D], key and value [B, KVH, K, D].

    Raises:
        NotImplementedError: soft-capped logits, which TensorRT's Attention refuses.
    """
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("attention with soft-capped logits")
    profile: Profile = active_cache.get().profile
    operation = _native if profile.native_attention else _primitive
    return operation(query, key, value, attention_mask, scaling).transpose(1, 2), None


def _native(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The ONNX operator in the one form that every runtime takes: 4-D, one output, a mask."""
    return torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask),
        {"scale": float(scaling)},
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=23,
    )


def _primitive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """MatMul, Softmax, MatMul; grouped queries fold into rows, so keys are never repeated."""
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    rows = (heads // kv_heads) * length
    query = query.reshape(batch, kv_heads, rows, width) * scaling
    scores = (query @ key.transpose(2, 3)).reshape(batch, heads, length, -1) + mask
    weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
    mixed = weights.reshape(batch, kv_heads, rows, -1) @ value
    return mixed.reshape(batch, heads, length, -1)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask_from_slots)
