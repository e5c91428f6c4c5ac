"""How far the numbers reach that a decoder caches: each value's channel, each pair of a key's.

Keys are turned by their positions before they are cached, two channels at a time, so what a channel
reached in a text says little about the positions that the text did not have: a slow pair passes its
largest number once in thousands of tokens. The radius of a pair stays, wherever it is turned to,
and how far a slow pair comes within the positions there are follows from its angle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pipeline.errors import InputError
from pipeline.progress import track
from pipeline.quantize.cache_rounding import Sides

# Single tokens that are read at two positions to see what turns.
_PROBES, _SEED = 64, 0
_WINDOWS_AT_ONCE = 2
# Of squares: what changes less is not turned, and two that make up for one another better are.
_UNTURNED, _PAIRED = 1e-3, 1e-2
# Of a slow pair: turned by less than so many radians, and looked at in so many places between.
_SLOW, _STEPS = math.pi / 2, 9


@dataclass(frozen=True)
class _Turning:
    """How positions turn the keys of a layer.

    Attributes:
        partner: int64 [kv heads, width], with which channel each is turned; itself where none is.
        angle: radians a position, of slow pairs.
        is_slow: pairs that all the positions there are turn by less than a quarter.
    """

    partner: torch.Tensor
    angle: torch.Tensor
    is_slow: torch.Tensor


class _Noting(DynamicCache):
    """A cache that notes what its layers are given, and keeps it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.given: dict[int, Sides] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        **kwargs: Any,
    ) -> Sides:  # fmt: skip
        self.given[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def cache_ranges(model: PreTrainedModel, tokens: torch.Tensor, length: int) -> list[Sides]:
    """Run a text and see how far keys and values reach, keys at any position below `length`.

    Args:
        model: a decoder in evaluation mode.
        tokens: int64 [N, L].
        length: positions that will be used.

    Returns:
        Of each layer keys and values [kv heads, width], float32.

    Raises:
        InputError: keys that change with their position otherwise than by turning pairs; numbers
            that are not finite.
    """
    turnings = _turned_pairs(model, length)
    most: list[Sides] = []
    for batch in track(list(tokens.split(_WINDOWS_AT_ONCE)), "what is cached"):
        found = [
            (_reach_of_keys(keys, turning, length), _reach(values))
            for (keys, values), turning in zip(_cached(model, batch), turnings, strict=True)
        ]
        most = most or found
        most = [
            (torch.maximum(k, keys), torch.maximum(v, values))
            for (k, v), (keys, values) in zip(most, found, strict=True)
        ]
    _require_finite(model, most)
    return most


def _reach(states: torch.Tensor) -> torch.Tensor:
    """The largest sizes [kv heads, width] in [B, kv heads, S, width]."""
    return states.float().abs().amax(dim=(0, 2))


def _reach_of_keys(keys: torch.Tensor, turning: _Turning, length: int) -> torch.Tensor:
    """Likewise of keys that were read from position 0 on, had they stood at any below `length`."""
    keys, own = keys.float(), torch.arange(keys.shape[-1])
    places = (torch.minimum(own, turning.partner), torch.maximum(own, turning.partner))
    first, second = (keys.gather(-1, place[None, :, None].expand_as(keys)) for place in places)
    alone, is_second = turning.partner == own, (own > turning.partner)[:, None, :]
    most = _reach(keys)
    positions = torch.arange(keys.shape[2])[:, None]
    for share in torch.linspace(0, 1, _STEPS):
        by = (share * (length - 1) - positions) * turning.angle[:, None, :]
        turned = torch.where(
            is_second, first * by.sin() + second * by.cos(), first * by.cos() - second * by.sin()
        )
        most = torch.maximum(most, _reach(turned))
    return torch.where(turning.is_slow | alone, most, _reach(torch.hypot(first, second)))


def _cached(model: PreTrainedModel, tokens: torch.Tensor, **keywords: Any) -> list[Sides]:
    """Keys and values of every layer, as they are cached."""
    cache = _Noting(model.config)
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **keywords)
    return [cache.given[layer] for layer in sorted(cache.given)]


@torch.no_grad()
def _turned_pairs(model: PreTrainedModel, length: int) -> list[_Turning]:
    """How the keys of each layer are turned.

    Tokens that stand alone attend to themselves, so between two positions nothing but the turning
    of their keys can change. Two channels that are turned together keep the sum of their squares.

    Raises:
        InputError: something else changes.
    """
    generator = torch.Generator().manual_seed(_SEED)
    words = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(words, (_PROBES, 1), generator=generator)
    first, *others = (
        _cached(model, tokens, position_ids=torch.full_like(tokens, position))
        # The fast pairs are turned by one position, the slow ones by many.
        for position in (0, 1, length - 1)
    )
    turnings = []
    for layer, (keys, values) in enumerate(first):
        changes = [found[layer][0].float() ** 2 - keys.float() ** 2 for found in others]
        if any(not torch.allclose(found[layer][1], values, 1e-3, 1e-5) for found in others):
            raise _unknown(model, f"values of layer {layer} that depend on their position")
        sizes = torch.cat([keys.float() ** 2] * len(others))
        partner = _partners(torch.cat(changes)[:, :, 0], sizes[:, :, 0])
        if partner is None:
            raise _unknown(model, f"keys of layer {layer} that are not turned by pairs of channels")
        at_once, at_last = (
            _angles(keys[:, :, 0], found[layer][0][:, :, 0], partner) for found in others
        )
        is_slow = at_once.abs() * (length - 1) < _SLOW
        angle = torch.where(is_slow, at_last / max(1, length - 1), 0.0)
        turnings.append(_Turning(partner, angle, is_slow))
    return turnings


def _angles(before: torch.Tensor, after: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """By how much pairs are turned, radians [kv heads, width], of keys [N, kv heads, width]."""
    own = torch.arange(partner.shape[1])
    places = (torch.minimum(own, partner), torch.maximum(own, partner))
    first, second = (
        torch.complex(*(keys.double().gather(-1, place.expand_as(keys)) for place in places))
        for keys in (before, after)
    )
    return (second * first.conj()).sum(0).angle().float()


def _partners(changes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor | None:
    """Which channels' squares make up for one another, of [N, kv heads, width]; None if unclear."""
    changes, sizes = changes.double().transpose(0, 1), sizes.double().transpose(0, 1)
    norms = changes.square().sum(1)  # [kv heads, width]
    changed = norms > _UNTURNED**2 * sizes.square().sum(1)
    both = norms[:, :, None] + norms[:, None, :]
    apart = both + 2 * changes.transpose(1, 2) @ changes
    apart = torch.where(both > 0, apart / both.clamp_min(1e-300), torch.inf)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest, partner = apart.min(dim=-1)
    own = torch.arange(partner.shape[1]).expand_as(partner)
    # Of a very slow pair the smaller number changes by more of itself, and the other hardly.
    paired = (partner.gather(1, partner) == own) & (nearest < _PAIRED)
    return None if bool((changed & ~paired).any()) else torch.where(paired, partner, own)


def _require_finite(model: PreTrainedModel, ranges: list[Sides]) -> None:
    for layer, sides in enumerate(ranges):
        if not all(bool(torch.isfinite(side).all()) for side in sides):
            raise InputError(
                "What the model caches is not finite.",
                where=f"layer {layer} of {type(model).__name__}",
                change="check the weights, or export without --cache",
            )


def _unknown(model: PreTrainedModel, observed: str) -> InputError:
    return InputError(
        "A cache of few bits needs to know how far this model's keys reach at any position.",
        where=type(model).__name__,
        observed=observed,
        expected="keys that rotary angles turn, two channels at a time, and values that they do "
        "not change",
        change="export without --cache",
    )
