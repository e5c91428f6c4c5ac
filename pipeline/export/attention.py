"""Attention, its mask and its cache in the forms that ONNX Runtime and TensorRT take.

Registered with transformers under one name, so that every architecture that supports its
attention interface is traced with them, whatever its masks (causal, sliding window) are. What looks
at images has no cache: a Swin gives its window biases and shift masks as one mask
[B * windows, heads, T, T], a ViT gives none. What attention takes beside q, k, v, mask and scale (a
soft cap, sinks) is carried into the graph; what is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from pipeline.export.contract import CONTRIB, CPU, GROUPED_ATTENTION, Profile

ATTENTION = "skipcat_export"
# ONNX Runtime's own attention takes heads whose width is a multiple of this.
_HEAD_WIDTH = 8
# Rows of a mask that are looked at before it is taken for a window: so many at the beginning, so
# many spread over the rest, and those around the first that leaves something out.
_LOOKED_AT = 64
# What transformers passes to attention beside the numbers, and what changes none of them: windows
# are a matter of the mask.
_NO_NUMBERS = {
    "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip
# transformers calls the functions below with no place for our own arguments.
active: ContextVar[tuple[Profile, GraphCache | None]] = ContextVar("active")


@dataclass(frozen=True)
class _Scores:
    """How scores become weights: softmax([softcap tanh(scale Q K^T / softcap) + mask, sinks]).

    Attributes:
        scale: of the products.
        softcap: 0 caps nothing.
        sinks: [H], the score of a key that every query sees and whose value is 0; None has none.
    """

    scale: float
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def weights(self, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The weights [B, H, S, K] of scores that are scaled, in their dtype."""
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = (scores + mask).float()
        if self.sinks is None:
            return torch.softmax(scores, dim=-1).to(mask.dtype)
        sinks = self.sinks.float().reshape(1, -1, 1, 1) + torch.zeros_like(scores[..., :1])
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)
        return weights[..., :-1].to(mask.dtype)


def padded_width(key_width: int, value_width: int) -> int:
    """Width of the heads that ONNX Runtime's own attention takes for keys and values so wide."""
    return -(-max(key_width, value_width) // _HEAD_WIDTH) * _HEAD_WIDTH


def _mask_from_slots(
    *,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    **unused: Any,
) -> torch.Tensor | None:
    """Additive mask, float [B, 1, S, K]: 0 where a query may look, very negative elsewhere.

    None where there is no cache; where the attention node masks by itself, a stand-in, by which
    `GraphCache.window_of` knows what the node is to be told.

    Args:
        kv_length: K.
        mask_function: (batch, head, query slot, key slot) -> allowed; causal, sliding, ...
        attention_mask: [B, T], T tokens so far or any padding of them.
        dtype: of the mask.
        unused: what else transformers passes.

    Raises:
        NotImplementedError: a mask that is neither causal nor a causal window, where the node
            knows no other.
    """
    _, cache = active.get()
    if cache is None:
        return None
    if cache.profile.contrib:
        return cache.stand_in_for(mask_function, dtype)
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


def _window_of(mask_function: Callable[..., torch.Tensor], length: int) -> int:
    """Keys that a query sees, its own among them; 0 where it sees all up to its own.

    Args:
        mask_function: as above.
        length: tokens within which that is to hold.

    Raises:
        NotImplementedError: some query sees other keys.
    """
    slots, last = torch.arange(length), length - 1

    def seen_by(queries: torch.Tensor) -> torch.Tensor:
        seen = mask_function(0, 0, queries[None, None, :, None], slots[None, None, None, :])
        return torch.as_tensor(seen).broadcast_to(1, 1, len(queries), length)[0, 0]

    window = int(seen_by(slots[last:]).sum())
    some = torch.cat(
        [
            slots[:_LOOKED_AT],
            torch.linspace(0, last, _LOOKED_AT).long(),
            torch.arange(window - 1, window + 2).clamp(0, last),
        ]
    )
    behind = some[:, None] - slots
    if not bool((seen_by(some) == ((behind >= 0) & (behind < window))).all()):
        raise NotImplementedError(
            f"attention that is neither causal nor in a causal window, in the profile '{CPU}'"
        )
    return window if window < length else 0


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling Q K^T + mask) V; query [B, H, S, D], key and value [B, KVH, K, D].

    Returns [B, S, H, D].

    Raises:
        NotImplementedError: something that attention is given and the graph would not have.
    """
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _NO_NUMBERS)
    if unknown:
        raise NotImplementedError(f"attention that is given {', '.join(unknown)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    how = _Scores(scale, float(softcap or 0), sinks)
    profile, cache = active.get()
    if cache is not None and profile.contrib:
        return _grouped(query, key, value, cache, how, cache.window_of(attention_mask)), None
    if cache is None:
        if attention_mask is None:
            attention_mask = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=query.dtype)
        attention_mask = attention_mask.to(query.dtype)
    assert attention_mask is not None, "_mask_from_slots gives one to every other profile"
    # TensorRT's Attention takes no soft cap, and nobody's has sinks.
    if profile.native_attention and not how.softcap and sinks is None:
        operation = _native
    else:
        operation = _primitive if cache is None else _primitive_by_group
    return operation(query, key, value, attention_mask, how).transpose(1, 2), None


def _native(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, how: _Scores
) -> torch.Tensor:
    """The ONNX operator in the one form that every runtime takes: 4-D, one output, a mask."""
    return torch.onnx.ops.symbolic(
        "Attention",
        (query, key, value, mask),
        {"scale": how.scale},
        dtype=query.dtype,
        shape=(*query.shape[:3], value.shape[3]),
        version=23,
    )


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: GraphCache,
    how: _Scores,
    window: int,
) -> torch.Tensor:
    """ONNX Runtime's attention: writes the cache in place; [B, S, H, D].

    Heads of a width that it does not take, and values of another width than the keys, are widened
    by zeros, which add nothing.

    Raises:
        NotImplementedError: attention over something else than what the cache was just given.
    """
    cache.require_latest(key, value)
    batch, heads, length, _ = query.shape
    past = (cache.keys[cache.layer], cache.values[cache.layer])
    width = past[0].shape[3]
    rows = [
        _widened(t, width).transpose(1, 2).reshape(batch, length, -1) for t in (query, key, value)
    ]
    attributes: dict[str, Any] = {
        "num_heads": heads, "kv_num_heads": key.shape[1], "scale": how.scale,
    }  # fmt: skip
    if window:
        attributes["local_window_size"] = window
    if how.softcap:
        attributes["softcap"] = how.softcap
    # Behind the lengths come cos, sin, positions and a bias.
    sinks = () if how.sinks is None else (None, None, None, None, how.sinks)
    mixed, *present = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::{GROUPED_ATTENTION}",
        (*rows, *past, *(cache.lengths or ()), *sinks),
        attributes,
        dtypes=(query.dtype,) * 3,
        shapes=(rows[0].shape, past[0].shape, past[1].shape),
        version=1,
    )
    cache.keys[cache.layer], cache.values[cache.layer] = present
    return mixed.reshape(batch, length, heads, width)[..., : value.shape[3]]


def _widened(heads: torch.Tensor, width: int) -> torch.Tensor:
    """[..., D] with zeros behind, up to [..., width]."""
    missing = width - heads.shape[-1]
    return torch.nn.functional.pad(heads, (0, missing)) if missing else heads


def _primitive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, how: _Scores
) -> torch.Tensor:
    """MatMul, Softmax, MatMul."""
    return how.weights((query * how.scale) @ key.transpose(2, 3), mask) @ value


def _primitive_by_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, how: _Scores
) -> torch.Tensor:
    """The same; grouped queries fold into rows, so keys are never repeated."""
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    rows = (heads // kv_heads) * length
    query = query.reshape(batch, kv_heads, rows, width) * how.scale
    scores = (query @ key.transpose(2, 3)).reshape(batch, heads, length, -1)
    weights = how.weights(scores, mask)
    mixed = weights.reshape(batch, kv_heads, rows, -1) @ value
    return mixed.reshape(batch, heads, length, -1)


AttentionInterface.register(ATTENTION, _attend)


AttentionMaskInterface.register(ATTENTION, _mask_from_slots)


class GraphCache:
    """Keys and values of all layers during tracing, with transformers' interface.

    They are inputs and outputs of the graph. The tokens of this call are written behind those of
    earlier calls, at slots last + 1 - S ... last, where `last` is the last slot that the attention
    mask marks in any row. So a mask as long as the tokens so far (ONNX Runtime, onnxruntime-genai)
    and one padded with zeros to the cache's length (CUDA graphs) mean the same, and padded rows
    keep their columns.

    With ONNX Runtime's own attention the node itself writes the cache: `update` only notes which
    layer comes next. There every row counts its own tokens: those that its mask marks.

    Args:
        profile: static (TensorScatter) or growing (Concat).
        past: key and value of layer 0, of layer 1, ...: [B, KVH, past or max length, D] each.
        slots: int64 [B, S], where the new tokens go; unused where the attention node knows.
        lengths: int32 [B], the tokens of each row with this call's, less one; and int32 [], those
            of the longest row. Only for ONNX Runtime's own attention.
        windows: of the masks that a call makes, in order; filled by a call in which tensors have
            values. Only for ONNX Runtime's own attention.
    """

    is_compileable = False

    def __init__(
        self,
        profile: Profile,
        past: list[torch.Tensor],
        slots: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
        windows: list[int] | None = None,
    ) -> None:
        self.profile = profile
        self.keys, self.values = list(past[0::2]), list(past[1::2])
        self.slots, self.lengths = slots, lengths
        self._windows: list[int] = [] if windows is None else windows
        self._stand_ins: list[tuple[torch.Tensor, int]] = []
        self._latest: tuple[torch.Tensor, torch.Tensor] | None = None
        self.layer = 0

    def stand_in_for(
        self, mask_function: Callable[..., torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """A tensor to give to attention as its mask, by which the mask's window is known.

        Raises:
            NotImplementedError: the mask is no window.
        """
        number = len(self._stand_ins)
        if not torch.compiler.is_exporting():  # there tensors have no values to look at
            self._windows[number:] = [_window_of(mask_function, self.keys[0].shape[2])]
        self._stand_ins.append((torch.zeros(1, 1, 1, 1, dtype=dtype), self._windows[number]))
        return self._stand_ins[-1][0]

    def window_of(self, mask: torch.Tensor | None) -> int:
        """Keys that a query sees by this stand-in of a mask; 0 for all before it.

        Raises:
            NotImplementedError: the model has made another mask out of it, or has one of its own.
        """
        for stand_in, window in self._stand_ins:
            if mask is stand_in:
                return window
        raise NotImplementedError(
            f"attention with a mask of the model's own, in the profile '{CPU}'"
        )

    def update(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values [B, KVH, S, D]; return all of the layer's.

        With ONNX Runtime's own attention, return the new ones alone.
        """
        self.layer = layer_idx
        if self.profile.contrib:
            self._latest = key, value
            return key, value
        self.keys[layer_idx] = self._extend(self.keys[layer_idx], key)
        self.values[layer_idx] = self._extend(self.values[layer_idx], value)
        return self.keys[layer_idx], self.values[layer_idx]

    def require_latest(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise NotImplementedError unless `update` has just returned these, and once alone.

        ONNX Runtime's own attention writes what it attends to; a layer that attends to a part of
        its cache, or twice, would store something else than it means to.
        """
        latest, self._latest = self._latest, None
        if latest is None or key is not latest[0] or value is not latest[1]:
            raise NotImplementedError(
                f"attention to other keys and values than its cache gets, in the profile '{CPU}'"
            )

    def _extend(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not self.profile.static_cache:
            return torch.cat([past, new], dim=2)
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new, self.slots[:, 0]),
            {"axis": -2},
            dtype=past.dtype,
            shape=past.shape,
            version=24,
        )

    @property
    def present(self) -> list[torch.Tensor]:
        """Key and value of layer 0, of layer 1, ... after all updates."""
        return [t for pair in zip(self.keys, self.values, strict=True) for t in pair]

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops old tokens: sliding windows are a matter of the mask alone."""
        return [False] * len(self.keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache before this call (static: its length)."""
        return self.keys[layer_idx].shape[2]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Unused: the mask is made from `slots`."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that attention will see, and the slot of the first."""
        past = self.keys[layer_idx].shape[2]
        if self.profile.contrib:
            return query_length, 0
        return (past if self.profile.static_cache else past + query_length), 0
