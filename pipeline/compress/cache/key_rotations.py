"""Moments of keys after they were turned by their positions, from those of keys before.

A key is turned in pairs of its numbers: R_p has (cos, -sin; sin, cos) of pair a at position p. With
positions as likely as one another, and keys that are alike at all of them, the mean over p of
R_p C R_p^T needs only the means of cos_a cos_b, cos_a sin_b and sin_a sin_b: no text as long as the
cache has to be read. What is learned at the few positions of a short text would be wrong at others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_cache import rotation_of
from pipeline.compress.cache.statistics import CacheStatistics
from pipeline.errors import InputError
from pipeline.model.cache_structure import CachedSide

# Positions that means are taken over: all up to here, or so many spread over more.
_POSITIONS, _AT_ONCE = 2048, 512
_PROBED = 16
_SAME = 1e-4
_Rotate = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class KeyRotations:
    """How keys of one layer are turned, at positions that are as likely as one another.

    Attributes:
        first: of each pair, the number that becomes cos x - sin y, int64 [n].
        second: the one that becomes sin x + cos y, int64 [n].
        cos: float64 [positions, n], times whatever scale there is.
        sin: likewise.
    """

    first: torch.Tensor
    second: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(
        cls, rotate: _Rotate, angles: tuple[torch.Tensor, torch.Tensor], width: int
    ) -> KeyRotations:
        """Read the pairs off the model's own rotation.

        Args:
            rotate: (keys [B, H, S, D], cos, sin) -> keys turned.
            angles: cos and sin as the attention is given them, [1, positions, ...].
            width: D.

        Raises:
            ValueError: numbers that are turned otherwise than in pairs.
        """
        cos, sin = (table.double() for table in angles)
        count = cos.shape[1]
        some = torch.linspace(0, count - 1, min(count, _PROBED)).long()
        units = torch.eye(width, dtype=torch.float64)[:, None, None].expand(-1, 1, len(some), -1)
        # [number that goes in, position, number that comes out]
        turned = rotate(units, cos[:, some], sin[:, some])[:, 0]
        first, second = _pairs(turned)
        alone = torch.zeros(1, 1, count, width, dtype=torch.float64)
        alone[..., first] = 1
        found = rotate(alone, cos, sin)[0, 0]
        made = cls(first, second, found[:, first], found[:, second])
        there = made.turned(units[:, 0], some)
        if not torch.allclose(there, turned, atol=_SAME, rtol=0):
            raise ValueError("keys are not turned in pairs of their numbers")
        return made

    def turned(self, keys: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Keys [..., len(places), D] at some of the positions."""
        cos, sin = self.cos[places], self.sin[places]
        x, y = keys[..., self.first], keys[..., self.second]
        found = keys.clone()
        found[..., self.first], found[..., self.second] = cos * x - sin * y, sin * x + cos * y
        return found

    def of_statistics(self, before: CacheStatistics) -> CacheStatistics:
        """Those of keys of one head after they were turned, of those before."""
        mean = self._mean(before.mean)
        square = before.mean.outer(before.mean)
        moment, weighted = (
            self._second(part + square) - mean.outer(mean)
            for part in (before.moment, before.weighted)
        )
        # A gradient by a turned key is one by the key, turned, over the square of the scale.
        scale = self.cos.square() + self.sin.square()
        back = KeyRotations(self.first, self.second, self.cos / scale, self.sin / scale)
        start = self._turned(before.start, self.cos[0], self.sin[0])
        return CacheStatistics(moment, weighted, mean, back._second(before.sensitivity), start)

    def _mean(self, mean: torch.Tensor) -> torch.Tensor:
        """Mean over p of R_p m, [D]."""
        return self._turned(mean, self.cos.mean(0), self.sin.mean(0))

    def _turned(self, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """A key [D] turned by these angles."""
        x, y = key[self.first], key[self.second]
        found = key.clone()
        found[self.first], found[self.second] = cos * x - sin * y, sin * x + cos * y
        return found

    def _second(self, moment: torch.Tensor) -> torch.Tensor:
        """Mean over p of R_p C R_p^T, [D, D]."""
        i, j, count = self.first, self.second, len(self.cos)
        cc, cs, ss = (
            a.T @ b / count
            for a, b in ((self.cos, self.cos), (self.cos, self.sin), (self.sin, self.sin))
        )
        sc = cs.T
        ii, ij, ji, jj = (moment[a][:, b] for a, b in ((i, i), (i, j), (j, i), (j, j)))
        found = torch.empty_like(moment)
        found[i[:, None], i] = cc * ii - cs * ij - sc * ji + ss * jj
        found[i[:, None], j] = cs * ii + cc * ij - ss * ji - sc * jj
        found[j[:, None], i] = sc * ii - ss * ij + cc * ji - cs * jj
        found[j[:, None], j] = ss * ii + sc * ij + cs * ji + cc * jj
        return found


def _pairs(turned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers that are turned together, those that are not in pairs of their own, int64 [D / 2].

    Args:
        turned: unit keys [D, positions, D] as they come out.

    Raises:
        ValueError: numbers that are not in pairs.
    """
    mixed = turned.abs().amax(1).fill_diagonal_(0)
    largest, partner = mixed.max(1)
    numbers = torch.arange(len(mixed))
    together = largest > 0
    lower = numbers[together & (partner > numbers)]
    still = numbers[~together]
    wrong = partner[partner[together]] != numbers[together]
    if bool(wrong.any()) or len(still) % 2:
        raise ValueError("keys are not turned in pairs of their numbers")
    rest = still.chunk(2) if len(still) else (still, still)
    return torch.cat([lower, rest[0]]), torch.cat([partner[lower], rest[1]])


def key_rotations(
    model: PreTrainedModel, structure: Sequence[CachedSide], length: int
) -> dict[str, KeyRotations]:
    """How the keys of every layer are turned, seen while the model reads tokens at all positions.

    Args:
        model: a decoder; it is not changed.
        structure: what it caches.
        length: positions that are served; the model's own limit, where that is less.

    Returns:
        Source -> its rotations; nothing for keys that are not turned.

    Raises:
        InputError: an attention whose keys are turned, or cached, in a way that is not known.
    """
    turned = [side for side in structure if side.side == "key" and side.is_rotated]
    positions = _spread(min(length, model.config.get_text_config().max_position_embeddings))
    rows = -(-len(positions) // _AT_ONCE)
    filled = torch.cat([positions, positions[: rows * _AT_ONCE - len(positions)]])
    ids = filled.view(rows, -1) if rows > 1 else positions[None]
    given: dict[str, list[dict[str, Any]]] = {_holder(side): [] for side in turned}
    with _noting_arguments(model, given), torch.no_grad():
        for part in ids.split(1):
            model(input_ids=0 * part, position_ids=part, use_cache=False, logits_to_keep=1)
    return {side.source: _found(model, side, given[_holder(side)]) for side in turned}


def _holder(side: CachedSide) -> str:
    return side.source.rpartition(".")[0]


def _spread(length: int) -> torch.Tensor:
    """Positions below a length, one out of each of equal parts, drawn by chance: int64 [P]."""
    if length <= _POSITIONS:
        return torch.arange(length)
    own = torch.Generator().manual_seed(0)
    parts = (torch.arange(_POSITIONS) + torch.rand(_POSITIONS, generator=own)) / _POSITIONS
    return (parts * length).long().clamp_max(length - 1)


@contextmanager
def _noting_arguments(
    model: PreTrainedModel, given: dict[str, list[dict[str, Any]]]
) -> Iterator[None]:
    """Inside, what attentions are called with is noted by their names."""

    def noting(calls: list[dict[str, Any]]) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.append(kwargs)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(noting(calls), with_kwargs=True)
        for name, calls in given.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _found(model: PreTrainedModel, side: CachedSide, calls: list[dict[str, Any]]) -> KeyRotations:
    rotate = rotation_of(model.get_submodule(_holder(side)))
    tables: list[Any] = [call.get("position_embeddings") for call in calls]
    unseen = any(table is None for table in tables)
    if rotate is None or unseen or any("past_key_values" not in call for call in calls):
        raise _unknown(side, "an attention that is not given its angles and its cache as usual")
    cos, sin = (torch.cat([table[n].cpu() for table in tables], dim=1) for n in (0, 1))
    try:
        return KeyRotations.of(rotate, (cos, sin), side.width)
    except ValueError as error:
        raise _unknown(side, str(error)) from error


def _unknown(side: CachedSide, observed: str) -> InputError:
    return InputError(
        "The keys of this model cannot be mapped after they were turned.",
        where=_holder(side),
        observed=observed,
        expected="position_embeddings and past_key_values, and pairs of numbers that turn",
        change="choose another --cache-form",
    )
