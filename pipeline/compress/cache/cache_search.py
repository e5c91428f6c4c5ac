"""The cache that costs the model least: ranks and bits of all keys and values, under one budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.compress.cache.cache_forms import (
    CACHE_FORMS,
    DEFAULT_CACHE_FORM,
    LATENT_BITS,
    CacheForm,
)
from pipeline.compress.cache.cache_plan import CachePlan, SidePlan
from pipeline.compress.cache.key_rotations import KeyRotations
from pipeline.compress.cache.latent_basis import LatentBasis, kept_bytes
from pipeline.compress.cache.statistics import CacheStatistics
from pipeline.compress.plan.knapsack import allocate
from pipeline.errors import UsageError
from pipeline.json_file import json_field
from pipeline.model.cache_structure import SIDES, CachedSide, Side
from pipeline.progress import note

_RANKS_PER_SIDE = 48


@dataclass(frozen=True)
class CachePrices:
    """What a measured run says of the prices: measured over expected KL of each kind of error.

    Attributes:
        truncation: side -> factor of cutting.
        rounding: side -> factor of rounding.
    """

    truncation: Mapping[Side, float]
    rounding: Mapping[Side, float]

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: object) -> CachePrices:
        """Those that were kept; raise InputError where they are none."""
        kinds = (json_field(raw, kind, dict, where) for kind in ("truncation", "rounding"))
        return cls(
            *({side: json_field(own, side, float, where) for side in SIDES} for own in kinds)
        )


AS_EXPECTED = CachePrices({"key": 1.0, "value": 1.0}, {"key": 1.0, "value": 1.0})


@dataclass(frozen=True)
class CacheProblem:
    """A cache to be planned, and what is known of it.

    Attributes:
        model: a decoder; its weights are final.
        structure: what it caches.
        bases: source -> the basis of each group of its heads.
        tokens: calibration text, int64 [N, T].
        held_out: of it, what the bases were not fitted to, int64 [M, T].
        budget_bytes: largest number of bytes a token, in all layers.
        groups: groups that the heads of a layer are divided into; 1 for all together.
        form: what latents are like; `by_head` goes with as many groups as heads, and with bases of
            keys that were turned.
        bits: numbers of bits to choose from; None among them for float16.
        prices: corrections of the expected KL.
    """

    model: PreTrainedModel
    structure: Sequence[CachedSide]
    bases: Mapping[str, Sequence[LatentBasis]]
    tokens: torch.Tensor
    held_out: torch.Tensor
    budget_bytes: int
    groups: int = 1
    bits: tuple[int | None, ...] = (None, *LATENT_BITS)
    prices: CachePrices = AS_EXPECTED
    form: CacheForm = CACHE_FORMS[DEFAULT_CACHE_FORM]

    def latent(self, side: CachedSide, rank: int, bits: int | None, expected_kl: float) -> SidePlan:
        """One side as latents of the problem's form."""
        narrow = self.form.by_head and side.side == "key" and side.is_rotated
        return SidePlan.latent(
            side, self.groups, rank, bits, expected_kl, narrow=narrow, error_feedback=True
        )


def searched_cache(problem: CacheProblem) -> CachePlan:
    """Choose rank and bits of every side, by one integer program.

    Raises:
        UsageError: no plan is small enough; says how small the smallest is.
    """
    return cheapest_cache(choices_of(problem), problem.budget_bytes)


def cheapest_cache(options: Sequence[Sequence[CachePlan]], budget_bytes: int) -> CachePlan:
    """The plan that is expected to cost least of all that take no more bytes a token.

    Args:
        options: every way to cache each side, or each layer.
        budget_bytes: for a token, in all layers.

    Raises:
        UsageError: as `searched_cache`.
    """
    sizes = [np.array([plan.token_bytes for plan in plans]) for plans in options]
    losses = [np.array([plan.expected_kl for plan in plans]) for plans in options]
    smallest = sum(int(s.min()) for s in sizes)
    if smallest > budget_bytes:
        raise UsageError(
            "No cache is so small.",
            observed=f"{budget_bytes} bytes a token",
            expected=f"at least {smallest}, with as few numbers of each layer as there can be",
            change="raise --cache-bytes or --keep-cache",
        )
    places = allocate(sizes, losses, budget_bytes, note)
    return joined(plans[i] for plans, i in zip(options, places, strict=True))


def joined(parts: Iterable[CachePlan]) -> CachePlan:
    """The plan of all that parts of it are plans of, in their order."""
    return CachePlan(tuple(side for part in parts for side in part.sides))


def choices_of(problem: CacheProblem) -> list[list[CachePlan]]:
    """What there is to choose from for each side, or each layer; no budget is looked at."""
    sides = [_options(side, problem) for side in problem.structure]
    if not problem.form.even:
        return [[CachePlan((plan,)) for plan in plans] for plans in sides]
    return [_even(*pair) for pair in zip(sides[::2], sides[1::2], strict=True)]


def _even(keys: list[SidePlan], values: list[SidePlan]) -> list[CachePlan]:
    """Every way to cache a layer whose keys and values are of one width."""
    by_rank = {plan.rank: plan for plan in values}
    return [CachePlan((key, by_rank[key.rank])) for key in keys if key.rank in by_rank]


def _options(side: CachedSide, problem: CacheProblem) -> list[SidePlan]:
    """Every way to cache one side: as it is, and at each rank in each number of bits."""
    bases, groups, prices = problem.bases[side.source], problem.groups, problem.prices
    truncation = np.sum([basis.truncation_losses() for basis in bases], axis=0)
    truncation = truncation * prices.truncation[side.side]
    most = side.numbers // groups
    form = problem.form
    step = form.even or math.ceil(most / _RANKS_PER_SIDE)
    first = form.least if 0 < form.least < most else step
    found = [SidePlan.full(side)] if None in problem.bits else []
    for bits in problem.bits:
        loss = truncation
        if bits is not None:
            rounding = np.sum([basis.rounding_losses(bits) for basis in bases], axis=0)
            loss = truncation + rounding * prices.rounding[side.side]
        for rank in sorted({*range(first, most, step), most}):
            if kept_bytes(rank, bits, groups) < 2 * side.numbers:
                found.append(problem.latent(side, rank, bits, float(loss[rank])))
    return found


def bases_of(
    structure: Sequence[CachedSide],
    statistics: Mapping[str, CacheStatistics],
    groups: int,
    *,
    two_sided: bool = True,
    centred: bool = True,
    rotations: Mapping[str, KeyRotations] = MappingProxyType({}),
) -> dict[str, list[LatentBasis]]:
    """Source -> the basis of each group of its heads.

    Args:
        structure: what the model caches.
        statistics: source -> moments of what it returns.
        groups: groups that the heads are divided into.
        two_sided: errors count as the model's output minds them, instead of all alike.
        centred: the mean is taken apart, instead of being spanned.
        rotations: source -> how its outputs, head by head, are turned before they are mapped.
    """
    found = {}
    for side in structure:
        width = side.numbers // groups
        parts = [
            statistics[side.source].heads(start, start + width)
            for start in range(0, side.numbers, width)
        ]
        if side.source in rotations:
            parts = [rotations[side.source].of_statistics(part) for part in parts]
        found[side.source] = [_basis_of(part, two_sided, centred) for part in parts]
    return found


def _basis_of(part: CacheStatistics, two_sided: bool, centred: bool) -> LatentBasis:
    moment = part.weighted if two_sided else part.moment
    sensitivity = part.sensitivity if two_sided else None
    if centred:
        return LatentBasis.of(moment, part.mean, sensitivity, part.start)
    return LatentBasis.of(moment + part.mean.outer(part.mean), 0 * part.mean, sensitivity)
