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

from pipeline.export.cache import GraphCache, padded_width
from pipeline.export.contract import CONTRIB, CPU, GROUPED_ATTENTION, POSITION_IDS, Profile
from pipeline.export.latent_attention import HeldSide
from pipeline.export.latents import GraphLatents

ATTENTION = "skipcat_export"
# What transformers and its models pass on, and what the mask says already or nothing minds.
_HARMLESS = (
    "sliding_window", "is_causal", POSITION_IDS, "cache_position", "use_cache", "layer_idx",
    "output_attentions", "output_hidden_states", "deterministic", "return_dict",
    "output_router_logits", "logits_to_keep", "num_items_in_batch", "position_embeddings",
)  # fmt: skip
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

    @property
    def is_plain(self) -> bool:
        """Whether scores are neither capped nor beside sinks."""
        return not self.softcap and self.sinks is None

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
    _refuse_unknown(kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    how = _Scores(scale, float(softcap or 0), sinks)
    profile, cache = active.get()
    if cache is not None:
        cache.attended += 1
    if cache is not None and profile.contrib:
        window = cache.window_of(attention_mask)
        return _grouped_by_latents(query, key, value, cache, how, window), None
    if cache is None:
        if attention_mask is None:
            attention_mask = torch.zeros(1, 1, query.shape[2], key.shape[2], dtype=query.dtype)
        attention_mask = attention_mask.to(query.dtype)
    assert attention_mask is not None, "_mask_from_slots gives one to every other profile"
    found = None if cache is None else cache.latents_of(key, value)
    if cache is not None and found is not None:
        latents, *held = found
        if not how.is_plain:
            key, value = latents.rebuilt(cache.layer, *held)
        elif _is_stock(profile, latents, cache.layer, held):
            return _narrow(query, attention_mask, cache, held, how).transpose(1, 2), None
        else:
            mixed = latents.attend(cache.layer, query * scale, attention_mask, *held)
            return mixed.transpose(1, 2), None
    operation = _operation(profile, how, cached=cache is not None)
    return operation(query, key, value, attention_mask, how).transpose(1, 2), None


def _operation(profile: Profile, how: _Scores, *, cached: bool) -> Callable[..., torch.Tensor]:
    # TensorRT's Attention takes no soft cap, and nobody's has sinks.
    if profile.native_attention and how.is_plain:
        return _native
    return _primitive_by_group if cached else _primitive


def _is_stock(profile: Profile, latents: GraphLatents, layer: int, held: list[HeldSide]) -> bool:
    """Whether what is cached of a layer is keys and values that the profile's attention takes.

    TensorRT's own wants both of one width.
    """
    widths = {side.held.shape[-1] for side in held}
    return latents.are_heads(layer) and (len(widths) == 1 or not profile.native_attention)


def _narrow(
    query: torch.Tensor,
    mask: torch.Tensor,
    cache: GraphCache,
    held: list[HeldSide],
    how: _Scores,
) -> torch.Tensor:
    """Attention to narrower keys and values: [B, H, S, D]."""
    assert cache.latents is not None, "whose heads these are"
    keys, values = (side.held for side in held)
    query = cache.latents.query_of(cache.layer, query)
    operation = _operation(cache.profile, how, cached=True)
    return cache.latents.values_of(cache.layer, operation(query, keys, values, mask, how))


def _grouped_by_latents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: GraphCache,
    how: _Scores,
    window: int,
) -> torch.Tensor:
    """ONNX Runtime's attention, of narrower heads where there are maps: [B, S, H, D].

    Raises:
        NotImplementedError: scores that are capped, or have sinks: there no constant drops out.
    """
    cache.require_own(key, value)
    latents = cache.latents
    if latents is None or cache.layer not in latents:
        return _grouped(query, key, value, cache, how, window)
    if not how.is_plain:
        raise NotImplementedError(f"capped scores of narrow keys, in the profile '{CPU}'")
    keys, values = (side.held for side in latents.of_new(cache.layer, (key, value)))
    query = latents.query_of(cache.layer, query)
    mixed = _grouped(query, keys, values, cache, how, window)
    return latents.values_of(cache.layer, mixed.transpose(1, 2)).transpose(1, 2)


def _refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError for biases by position, and whatever else is not a mask."""
    unknown = sorted(
        name for name, value in arguments.items() if value is not None and name not in _HARMLESS
    )
    if unknown:
        raise NotImplementedError(f"attention that takes {', '.join(unknown)} too")


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
    """
    batch, heads, length, _ = query.shape
    past = (cache.keys[cache.layer], cache.values[cache.layer])
    width = padded_width(key.shape[3], value.shape[3])
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
    behind: tuple[torch.Tensor | None, ...] = ()
    if how.sinks is not None or cache.scales is not None:
        behind = (None, None, None, None, how.sinks)
    if cache.scales is not None:
        attributes |= {
            "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": 8,
        }  # fmt: skip
        behind += cache.scales[cache.layer]
    mixed, *present = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::{GROUPED_ATTENTION}",
        (*rows, *past, *(cache.lengths or ()), *behind),
        attributes,
        dtypes=(query.dtype, past[0].dtype, past[1].dtype),
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
