"""Attention over patches in the forms that ONNX Runtime and TensorRT take.

Registered with transformers under one name; a Swin gives its window biases and shift masks as one
mask [B * windows, heads, T, T], a ViT gives none.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from transformers.modeling_utils import AttentionInterface

from pipeline.export.contract import Profile

NAME = "skipcat_image_export"
# transformers calls `attend` with no place for our own arguments.
active_profile: ContextVar[Profile] = ContextVar("active_profile")


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling Q K^T + mask) V; query, key and value [B, H, T, D], result [B, T, H, D].

    Raises:
        NotImplementedError: soft-capped logits, which TensorRT's Attention refuses.
    """
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("attention with soft-capped logits")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if attention_mask is None:
        attention_mask = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=query.dtype)
    operation = _native if active_profile.get().native_attention else _primitive
    mixed = operation(query, key, value, attention_mask.to(query.dtype), scaling)
    return mixed.transpose(1, 2), None


def _native(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The ONNX operator in the one form that every runtime takes: 4-D, one output, a mask."""
    return torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask),
        {"scale": scaling},
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=23,
    )


def _primitive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """MatMul, Softmax, MatMul."""
    scores = (query * scaling) @ key.transpose(2, 3) + mask
    return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value


AttentionInterface.register(NAME, attend)
