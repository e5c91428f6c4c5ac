"""RAP: pairs of numbers that turn together are left out of the cache, and nothing is mapped.

What a pair of keys is worth is its part of the Fisher information, E |k_i g_i|^2 summed over heads:
the same pairs are kept in every head of a layer, as rotation and projections of one width need
(RoPE-aligned pruning, 2026). Of values the numbers of each head are chosen alike, singly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.compress.cache.statistics import CacheStatistics
from pipeline.model.cache_structure import CachedSide


@dataclass(frozen=True)
class KeptNumbers:
    """Of each layer, which numbers of a head are cached: 1 or 0, float [width] of keys and values.

    Attributes:
        keys: in the order of the layers.
        values: likewise.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def of(
        cls,
        structure: Sequence[CachedSide],
        statistics: Mapping[str, CacheStatistics],
        removed: float,
    ) -> KeptNumbers:
        """Those worth most.

        Args:
            structure: what the model caches, keys and values of each layer in turn.
            statistics: source -> moments of what it returns.
            removed: share of all numbers that is left out, the same in every layer.
        """
        kept: dict[str, list[torch.Tensor]] = {"key": [], "value": []}
        for side in structure:
            found = statistics[side.source]
            second = found.moment.diagonal() + found.mean.square()
            worth = (second * found.sensitivity.diagonal()).unflatten(0, (side.heads, -1)).sum(0)
            if side.side == "key" and side.is_rotated:
                halves = worth.unflatten(0, (2, -1)).sum(0)  # number i turns with i + width / 2
                worth = halves.repeat(2)
            count = round((1 - removed) * side.width / 2) * 2
            mask = torch.zeros(side.width)
            mask[worth.argsort(descending=True, stable=True)[:count]] = 1
            kept[side.side].append(mask)
        return cls(kept["key"], kept["value"])

    def of_layer(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with zeros for what is left out."""
        return keys * self.keys[layer], values * self.values[layer]
