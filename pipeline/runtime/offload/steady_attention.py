"""Attention over a cache of fixed length that others hold, whose sums are always taken alike.

Every call multiplies matrices of the same shapes, however many of its rows count, wherever they
stand and whosever they are, so that a row's bits are its own. transformers would leave the mask out
where it can, and then add up otherwise; and it would copy the keys for each head that shares them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pipeline.errors import InputError
from pipeline.runtime.draft_tree import branches_of, depths_of
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS

STEADY_ATTENTION = "skipcat_steady"
# What some models hand to their attention, and this does not know.
_UNKNOWN = ("s_aux", "position_bias")
# Places that a row attends to, at the least; then twice as many, and so on.
_FEWEST_PLACES = 256


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence that stand side by side in a call.

    Attributes:
        slot: row of the cache.
        start: tokens of the sequence before them.
        ids: int64 [S].
        parents: the place in `ids` of the token that each stands behind, -1 for the first; None
            where they stand one behind another.
    """

    slot: int
    start: int
    ids: np.ndarray
    parents: tuple[int, ...] | None = None

    @property
    def places(self) -> np.ndarray:
        """Of each token in the sequence, int64 [S]."""
        ahead = np.arange(len(self.ids)) if self.parents is None else depths_of(self.parents)
        return self.start + np.asarray(ahead, np.int64)

    @cached_property
    def branches(self) -> list[np.ndarray]:
        """Rows of the tokens from the first to each last one, int64; the first branch first."""
        if self.parents is None:
            return [np.arange(len(self.ids))]
        return [np.array(branch) for branch in branches_of(self.parents)]


# Keys and values of a layer, [slots, heads, length, width] each.
Held = tuple[torch.Tensor, torch.Tensor]


class CallCache(Cache):
    """The cache as one call sees it: its rows belong to places of one sequence or of several.

    Args:
        held: keys and values of each layer, which belong to somebody else.
        parts: whose rows they are, in their order; of different slots.
        rows: of the call. Those behind the parts only fill it up, and leave nothing.

    Attributes:
        ids: int64 [1, rows].
        positions: likewise, of each token in its sequence.
        device: where keys and values are.
    """

    def __init__(self, held: Sequence[Held], parts: Sequence[Part], rows: int) -> None:
        super().__init__(layers=[_CallLayer(pair, parts) for pair in held])
        used = sum(len(part.ids) for part in parts)
        ids = [part.ids for part in parts]
        places = [part.places for part in parts]
        last = len(parts) - 1
        self.ids = np.concatenate([*ids, np.repeat(ids[last][-1:], rows - used)])[None]
        self.positions = np.concatenate([*places, np.repeat(places[last][-1:], rows - used)])[None]
        self.device = held[0][0].device
        self._latest: CacheLayerMixin | None = None
        self.groups = _groups(parts, held[0][0].shape[2], self.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Write the rows of a layer, which attends next."""
        self._latest = self.layers[layer_idx]
        return super().update(key_states, value_states, layer_idx, *rest, **named)

    def write(self, branch: _Branch) -> None:
        """Put a branch where the layer that attends looks for it."""
        assert isinstance(self._latest, _CallLayer)
        self._latest.write(branch)

    def write_path(self, first: int, part: Part, rows: Sequence[int]) -> None:
        """Write the keys and values of some rows of a part behind its first.

        In every layer that was run.

        Args:
            first: the part's first row in the call, which has been run.
            part: whose tokens branch.
            rows: of the part.
        """
        wanted = torch.tensor([first + row for row in rows]).to(self.device)
        for layer in self.layers:
            assert isinstance(layer, _CallLayer)
            if layer.has_run:
                layer.write(_Branch(part.slot, part.start + 1, wanted))

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """What is added to a row's number for its place in the sequence: [rows]."""
        offsets = self.positions[0] - np.arange(self.positions.shape[1])
        return torch.from_numpy(offsets).to(self.device)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Let attention inside be over this cache."""
        before = _AT_WORK.set(self)
        try:
            yield
        finally:
            _AT_WORK.reset(before)


_AT_WORK: ContextVar[CallCache] = ContextVar("_AT_WORK")


@dataclass(frozen=True)
class _Branch:
    """Rows of a call that stand one behind another in a slot, from a place on."""

    slot: int
    start: int
    rows: torch.Tensor


@dataclass(frozen=True)
class _Group:
    """Rows of a call that attend to the same places of one slot.

    Attributes:
        slot: of the cache.
        places: that they attend to, from the first on; the mask leaves out those behind each.
        rows: which they are.
        branch: that has to be written before, where tokens branch.
    """

    slot: int
    places: int
    rows: torch.Tensor
    branch: _Branch | None


def _groups(parts: Sequence[Part], length: int, device: torch.device) -> list[_Group]:
    """By slot, and by how many places are looked at, which is a matter of a row's own place.

    A prompt's part is read in the same call whatever else there is, so its last row may decide.
    """
    found: list[_Group] = []
    first = 0
    for part in parts:
        count, places = len(part.ids), part.places
        wanted = np.full(count, places[-1]) if count > STEADY_TOKENS else places
        sizes = np.array([_places(int(place), length) for place in wanted])
        taken = np.zeros(count, bool)
        for rows in reversed(part.branches):  # the first one stays in the cache
            own = rows[~taken[rows]]
            taken[rows] = True
            branch = None
            if part.parents is not None:
                branch = _Branch(part.slot, part.start, torch.from_numpy(first + rows).to(device))
            for size in np.unique(sizes[own]):
                some = torch.from_numpy(first + own[sizes[own] == size]).to(device)
                found.append(_Group(part.slot, int(size), some, branch))
        first += count
    return found


def _places(place: int, length: int) -> int:
    """How many places a row at a place attends to: few sizes, so that few kernels are met."""
    wanted = _FEWEST_PLACES
    while wanted <= place:
        wanted *= 2
    return min(wanted, length)


class _CallLayer(CacheLayerMixin):
    """Keys and values of one layer; all places are handed out, the mask tells which count."""

    is_sliding = False

    def __init__(self, held: Held, parts: Sequence[Part]) -> None:
        super().__init__()
        self.keys, self.values = held
        self.is_initialized = True
        self._parts = parts
        self._fresh: Held | None = None  # of the call, where tokens branch

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the memory is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each part's rows where they belong; what fills the call up leaves nothing."""
        assert self.keys is not None
        assert self.values is not None
        row = 0
        if any(part.parents is not None for part in self._parts):
            self._fresh = key_states, value_states
        for part in self._parts:
            count = len(part.ids)
            if part.parents is not None:  # each branch once it is attended to, over numbers
                longest = torch.from_numpy(row + max(part.branches, key=len))
                self.write(_Branch(part.slot, part.start, longest.to(key_states.device)))
                row += count
                continue
            places = slice(part.start, part.start + count)
            self.keys[part.slot, :, places] = key_states[0, :, row : row + count]
            self.values[part.slot, :, places] = value_states[0, :, row : row + count]
            row += count
        return self.keys, self.values

    @property
    def has_run(self) -> bool:
        """Whether there are rows to write."""
        return self._fresh is not None

    def write(self, branch: _Branch) -> None:
        """Put rows of the call into the cache, one behind another."""
        assert self._fresh is not None
        assert self.keys is not None
        assert self.values is not None
        places = slice(branch.start, branch.start + len(branch.rows))
        self.keys[branch.slot, :, places] = self._fresh[0][0, :, branch.rows]
        self.values[branch.slot, :, places] = self._fresh[1][0, :, branch.rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All places, from the first on."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """Tokens before the call, of its first part."""
        return self._parts[0].start

    def get_max_length(self) -> int:
        """Places of a slot."""
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

    Rows of different slots attend apart, and so do branches of draft tokens, each of which is put
    where it would stand without the others: all rows of the call to the keys, of which those that
    belong there are taken, so that the products have the same shapes in any company.

    Args:
        module: the layer's attention.
        query: [1, H, S, D].
        key: [slots, KV, T, D].
        value: [slots, KV, T, D'].
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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scaled = query * scale
    mixed = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    cache = _AT_WORK.get()
    written: _Branch | None = None
    for group in cache.groups:
        if group.branch is not None and group.branch is not written:
            cache.write(written := group.branch)
        own, seen = slice(group.slot, group.slot + 1), slice(group.places)
        found = _attend_to_slot(
            scaled, key[own, :, seen], value[own, :, seen], attention_mask[..., seen], softcap
        )
        mixed[:, :, group.rows] = found[:, :, group.rows]
    return mixed.transpose(1, 2).contiguous(), None


def _attend_to_slot(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """[1, H, S, D'] of one slot: softmax(Q Kᵀ + mask) V; arguments as of `_attend`, Q scaled."""
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    folded = query.reshape(batch, groups, heads // groups * rows, width)
    scores = (folded @ key.transpose(2, 3)).reshape(batch, heads, rows, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    is_bool = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = weights.reshape(batch, groups, heads // groups * rows, -1)
    return (weights @ value).reshape(batch, heads, rows, -1)


AttentionInterface.register(STEADY_ATTENTION, _attend)
AttentionMaskInterface.register(STEADY_ATTENTION, _mask)
