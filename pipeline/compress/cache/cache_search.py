"""The cache that costs the model least: ranks and bits of all keys and values, under one budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.compress.cache.cache_plan import CachePlan, SidePlan
from pipeline.compress.cache.latent_basis import LatentBasis, kept_bytes
from pipeline.compress.cache.statistics import CacheStatistics
from pipeline.compress.plan.knapsack import allocate
from pipeline.compress.request import LATENT_BITS
from pipeline.errors import UsageError
from pipeline.model.cache_structure import CachedSide, Side

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


AS_EXPECTED = CachePrices({"key": 1.0, "value": 1.0}, {"key": 1.0, "value": 1.0})


@dataclass(frozen=True)
class CacheBudget:
    """What a search of the cache may choose from.

    Attributes:
        token_bytes: largest number of bytes a token, in all layers.
        groups: groups that the heads of a layer are divided into; 1 for all together.
        bits: numbers of bits to choose from; None among them for float16.
        multiple: ranks are multiples of this.
    """

    token_bytes: int
    groups: int = 1
    bits: tuple[int | None, ...] = (None, *LATENT_BITS)
    multiple: int = 1


def searched_cache(
    structure: Sequence[CachedSide],
    bases: Mapping[str, Sequence[LatentBasis]],
    budget: CacheBudget,
    prices: CachePrices = AS_EXPECTED,
) -> CachePlan:
    """Choose rank and bits of every side, by one integer program.

    Args:
        structure: what the model caches.
        bases: source -> the basis of each group of its heads.
        budget: bytes a token, and what there is to choose from.
        prices: corrections of the expected KL.

    Raises:
        UsageError: no plan is small enough; says how small the smallest is.
    """
    options = [_options(side, bases[side.source], budget, prices) for side in structure]
    sizes = [np.array([plan.token_bytes for plan in plans]) for plans in options]
    losses = [np.array([plan.expected_kl for plan in plans]) for plans in options]
    smallest = sum(int(s.min()) for s in sizes)
    if smallest > budget.token_bytes:
        raise UsageError(
            "No cache is so small.",
            observed=f"{budget.token_bytes} bytes a token",
            expected=f"at least {smallest}, one coordinate in {min(LATENT_BITS)} bits everywhere",
            change="raise --cache-bytes or --keep-cache",
        )
    places = allocate(sizes, losses, budget.token_bytes)
    return CachePlan(tuple(plans[i] for plans, i in zip(options, places, strict=True)))


def _options(
    side: CachedSide, bases: Sequence[LatentBasis], budget: CacheBudget, prices: CachePrices
) -> list[SidePlan]:
    """Every way to cache one side: as it is, and at each rank in each number of bits."""
    groups, most = budget.groups, side.numbers // budget.groups
    truncation = sum(basis.truncation_losses() for basis in bases) * prices.truncation[side.side]
    step = budget.multiple * math.ceil(most / _RANKS_PER_SIDE / budget.multiple)
    ranks = np.unique(
        np.r_[np.arange(step, most, step), most if most % budget.multiple == 0 else 1]
    )
    found = [SidePlan.full(side)] if None in budget.bits else []
    for bits in budget.bits:
        loss = truncation
        if bits is not None:
            rounding = sum(basis.rounding_losses(bits) for basis in bases)
            loss = truncation + rounding * prices.rounding[side.side]
        for rank in map(int, ranks):
            if kept_bytes(rank, bits, groups) < 2 * side.numbers:
                found.append(SidePlan.latent(side, groups, rank, bits, float(loss[rank])))
    return found


def bases_of(
    structure: Sequence[CachedSide],
    statistics: Mapping[str, CacheStatistics],
    groups: int,
    *,
    two_sided: bool = True,
    centred: bool = True,
) -> dict[str, list[LatentBasis]]:
    """Source -> the basis of each group of its heads.

    Args:
        structure: what the model caches.
        statistics: source -> moments of what it returns.
        groups: groups that the heads are divided into.
        two_sided: errors count as the model's output minds them, instead of all alike.
        centred: the mean is taken apart, instead of being spanned.
    """
    found = {}
    for side in structure:
        width = side.numbers // groups
        parts = [
            statistics[side.source].heads(start, start + width)
            for start in range(0, side.numbers, width)
        ]
        found[side.source] = [
            LatentBasis.of(
                part.moment if centred else part.moment + part.mean.outer(part.mean),
                part.mean if centred else part.mean * 0,
                part.sensitivity if two_sided else None,
            )
            for part in parts
        ]
    return found
