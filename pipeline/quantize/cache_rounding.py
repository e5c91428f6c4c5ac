"""Keys and values in 8 bits: one fixed scale for each channel of each head.

    code = round(x / scale), -128 ... 127        x' = scale code

as ONNX Runtime's GroupQueryAttention rounds what it caches. A number's code depends on nothing but
the number, so it is the same whatever was read before it, and however a text was cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LOWEST, _HIGHEST = -128, 127
# Of a channel in which nothing was ever seen; and of those that a runtime adds, which hold zeros.
_SMALLEST_SCALE, _NO_SCALE = 1e-8, 1.0
Sides = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CacheRounding:
    """The scales of a cache.

    Attributes:
        scales: of keys and values of every layer, float32 [kv heads, width] each.
    """

    scales: tuple[Sides, ...]

    @classmethod
    def reaching(
        cls, ranges: Sequence[Sides], for_keys: float = 1.0, for_values: float = 1.0
    ) -> CacheRounding:
        """Scales whose largest codes stand for the ends of ranges.

        Args:
            ranges: of keys and values of every layer, [kv heads, width] each.
            for_keys: the share of their ranges that is kept.
            for_values: likewise.
        """
        shares = (for_keys, for_values)
        return cls(
            tuple((_scales(keys, shares[0]), _scales(values, shares[1])) for keys, values in ranges)
        )

    def rounded(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Sides:
        """What is read back of keys and values [B, kv heads, S, width]."""
        for_keys, for_values = self.scales[layer]
        return _rounded(keys, for_keys), _rounded(values, for_values)

    def widened(self, layer: int, width: int) -> Sides:
        """The scales of a layer as vectors [kv heads * width], of heads widened by zeros."""
        keys, values = (
            torch.nn.functional.pad(side, (0, width - side.shape[1]), value=_NO_SCALE).flatten()
            for side in self.scales[layer]
        )
        return keys, values

    def sha256(self) -> str:
        """Hex digest of all scales."""
        digest = hashlib.sha256()
        for side in (side for sides in self.scales for side in sides):
            digest.update(side.contiguous().numpy().astype("<f4").tobytes())
        return digest.hexdigest()


def _scales(reach: torch.Tensor, share: float) -> torch.Tensor:
    return (share * reach.float() / _HIGHEST).clamp_min(_SMALLEST_SCALE)


def _rounded(states: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    steps = scales[:, None, : states.shape[-1]]  # a graph's heads may be widened
    codes = (states.float() / steps).round().clamp(_LOWEST, _HIGHEST)
    return (codes * steps).to(states.dtype)
