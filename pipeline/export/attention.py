"""Attention, its mask and its cache in the forms that ONNX Runtime and TensorRT take.

Registered with transformers under one name, so that every architecture that supports its
attention interface is traced with them, whatever its masks (causal, sliding window) are. What looks
at images has no cache: a Swin gives its window biases and shift masks as one mask
[B * windows, heads, T, T], a ViT gives none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from pipeline.export.contract import CONTRIB, CPU, GROUPED_ATTENTION, Profile

ATTENTION = "skipcat_export"
# ONNX Runtime's own attention takes heads whose width is a multiple of this.
_HEAD_WIDTH = 16
# What transformers and its models pass on, and what the mask says already or nothing minds.
_HARMLESS = (
    "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "layer_idx",
    "output_attentions", "output_hidden_states", "deterministic", "return_dict",
    "output_router_logits", "logits_to_keep", "num_items_in_batch", "position_embeddings",
)  # fmt: skip
# transformers calls the functions below with no place for our own arguments.
active: ContextVar[tuple[Profile, GraphCache | None]] = ContextVar("active")


def _mask_from_slots(
    *,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    **unused: Any,
) -> torch.Tensor | None:
    """Additive mask, float [B, 1, S, K]: 0 where a query may look, very negative elsewhere.

    None where the attention node is causal by itself, or where there is no cache.

    Args:
        kv_length: K.
        mask_function: (batch, head, query slot, key slot) -> allowed; causal, sliding, ...
        attention_mask: [B, T], T tokens so far or any padding of them.
        dtype: of the mask.
        unused: what else transformers passes.

    Raises:
        NotImplementedError: another mask than the causal one, where the node knows no other.
    """
    _, cache = active.get()
    if cache is None:
        return None
    if cache.profile.contrib:
        if not torch.compiler.is_exporting():  # there tensors have no values to look at
            _require_causal(mask_function, cache.keys[0].shape[2])
        return None
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


def _require_causal(mask_function: Callable[..., torch.Tensor], length: int) -> None:
    """Raise NotImplementedError when some query within `length` tokens looks elsewhere."""
    slots = torch.arange(length)
    allowed = mask_function(0, 0, slots[None, None, :, None], slots[None, None, None, :])
    causal = slots[:, None] >= slots
    if not bool((torch.as_tensor(allowed).broadcast_to(1, 1, length, length) == causal).all()):
        raise NotImplementedError(f"attention that is not plainly causal, in the profile '{CPU}'")


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
        NotImplementedError: soft-capped logits, which TensorRT's Attention refuses; anything else
            that changes attention and that no graph of ours has.
    """
    _refuse_unknown(kwargs)
    if kwargs.get("softcap") is not None:
        raise NotImplementedError("attention with soft-capped logits")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    profile, cache = active.get()
    if cache is not None:
        cache.attended += 1
    if cache is not None and profile.contrib:
        _require_own(key, value, attention_mask, cache)
        return _grouped(query, key, value, cache, scaling), None
    if cache is None:
        if attention_mask is None:
            attention_mask = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=query.dtype)
        attention_mask = attention_mask.to(query.dtype)
    assert attention_mask is not None, "_mask_from_slots gives one to every other profile"
    if profile.native_attention:
        operation = _native
    else:
        operation = _primitive if cache is None else _primitive_by_group
    return operation(query, key, value, attention_mask, scaling).transpose(1, 2), None


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError for sinks, biases by position, and whatever else is not a mask."""
    unknown = sorted(
        name
        for name, value in arguments.items()
        if value is not None and name not in _HARMLESS and name != "softcap"
    )
    if unknown:
        raise NotImplementedError(f"attention that takes {', '.join(unknown)} too")


def _require_own(
    key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, cache: GraphCache
) -> None:
    """Raise NotImplementedError where what is attended to is not what the node will cache."""
    if mask is not None:
        raise NotImplementedError(f"attention with a mask of its own, in the profile '{CPU}'")
    if cache.new is None or key is not cache.new[0] or value is not cache.new[1]:
        raise NotImplementedError(
            f"keys or values that change behind the cache, in the profile '{CPU}'"
        )


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


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: GraphCache, scaling: float
) -> torch.Tensor:
    """ONNX Runtime's attention: writes the cache in place; [B, S, H, D].

    Raises:
        NotImplementedError: heads of a width that it does not take.
    """
    batch, heads, length, width = query.shape
    if width % _HEAD_WIDTH or value.shape[3] != width:
        raise NotImplementedError(
            f"heads {width} wide in the profile '{CPU}', whose attention takes a multiple of "
            f"{_HEAD_WIDTH}"
        )
    rows = [t.transpose(1, 2).reshape(batch, length, -1) for t in (query, key, value)]
    past = (cache.keys[cache.layer], cache.values[cache.layer])
    mixed, *present = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::{GROUPED_ATTENTION}",
        (*rows, *past, *(cache.lengths or ())),
        {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": scaling},
        dtypes=(query.dtype,) * 3,
        shapes=(rows[0].shape, past[0].shape, past[1].shape),
        version=1,
    )
    cache.keys[cache.layer], cache.values[cache.layer] = present
    return mixed.reshape(batch, length, heads, width)


def _primitive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """MatMul, Softmax, MatMul."""
    scores = (query * scaling) @ key.transpose(2, 3) + mask
    return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ value


def _primitive_by_group(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The same; grouped queries fold into rows, so keys are never repeated."""
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    rows = (heads // kv_heads) * length
    query = query.reshape(batch, kv_heads, rows, width) * scaling
    scores = (query @ key.transpose(2, 3)).reshape(batch, heads, length, -1) + mask
    weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
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
    """

    is_compileable = False

    def __init__(
        self,
        profile: Profile,
        past: list[torch.Tensor],
        slots: torch.Tensor,
        lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.profile = profile
        self.keys, self.values = list(past[0::2]), list(past[1::2])
        self.slots, self.lengths = slots, lengths
        self.layer = 0
        self.updated = self.attended = 0
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None

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
        self.layer, self.new = layer_idx, (key, value)
        self.updated += 1
        if self.profile.contrib:
            return key, value
        self.keys[layer_idx] = self._extend(self.keys[layer_idx], key)
        self.values[layer_idx] = self._extend(self.values[layer_idx], value)
        return self.keys[layer_idx], self.values[layer_idx]

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

    def require_attention(self) -> None:
        """Raise NotImplementedError when some layer attended in a way of its own."""
        if self.attended < self.updated:
            raise NotImplementedError("attention that does not go through transformers' interface")

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
