"""Attention over a cache of fixed length that others hold, whose sums are always taken alike.

Every call multiplies matrices of the same shapes, however many of its rows count and wherever they
stand, so that a row's bits are its own. transformers would leave the mask out where it can, and
then add up otherwise; and it would copy the keys for each head that shares them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pipeline.errors import InputError

STEADY_ATTENTION = "skipcat_steady"
# What some models hand to their attention, and this does not know.
_UNKNOWN = ("s_aux", "position_bias")


class RowCache(Cache):
    """The cache of one call, over one row of keys and values that belong to somebody else."""

    def __init__(self, keys_values: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Over keys and values of each layer, float32 [1, heads, length, width]."""
        super().__init__(layers=[_RowLayer(*pair) for pair in keys_values])

    def place(self, start: int, count: int) -> None:
        """Let the next call write its first `count` tokens behind `start` others."""
        for layer in self.layers:
            layer.start, layer.count = start, count


class _RowLayer(CacheLayerMixin):
    """Keys and values of one layer; all places are handed out, the mask tells which count."""

    is_sliding = False

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        super().__init__()
        self.keys, self.values = torch.from_numpy(keys), torch.from_numpy(values)
        self.is_initialized = True
        self.start = self.count = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows that count; rows that only fill the call up leave nothing."""
        assert self.keys is not None
        assert self.values is not None
        end = self.start + self.count
        self.keys[:, :, self.start : end] = key_states[:, :, : self.count]
        self.values[:, :, self.start : end] = value_states[:, :, : self.count]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All places, from the first on."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Tokens before the call."""
        return self.start

    def get_max_length(self) -> int:
        """Places of the row."""
        assert self.keys is not None
        return self.keys.shape[2]


def _mask(*sizes: Any, **settings: Any) -> torch.Tensor | None:
    """The mask, bool [1, 1, S, T], also where it could be left out."""
    return sdpa_mask(*sizes, **(settings | {"allow_is_causal_skip": False}))


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(Q Kᵀ s + mask) V; heads that share keys are rows of one product.

    Args:
        module: the layer's attention.
        query: [1, H, S, D].
        key: [1, KV, T, D].
        value: [1, KV, T, D'].
        attention_mask: bool [1, 1, S, T], or what is added to the scores.
        scaling: s; None is 1 / sqrt(D).
        softcap: scores are squeezed into this range, as Gemma 2's are.
        settings: of other kinds of attention.

    Returns:
        [1, S, H, D'], and no weights.

    Raises:
        InputError: the model asks for attention of another kind.
    """
    odd = [name for name in _UNKNOWN if settings.get(name) is not None]
    if odd or attention_mask is None:
        raise InputError(
            "This model's attention is of a kind that cannot be offloaded.",
            where=type(module).__name__,
            observed=", ".join(odd) or "no mask",
        )
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    folded = (query * scale).reshape(batch, groups, heads // groups * rows, width)
    scores = (folded @ key.transpose(2, 3)).reshape(batch, heads, rows, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    else:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1).reshape(batch, groups, heads // groups * rows, -1)
    mixed = (weights @ value).reshape(batch, heads, rows, -1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(STEADY_ATTENTION, _attend)
AttentionMaskInterface.register(STEADY_ATTENTION, _mask)
