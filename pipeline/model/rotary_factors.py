"""Divisors of rotary frequencies, as GGUF has them, and the settings of Llama 3 that give them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

_TOLERANCE = 1e-4
_NEAR_ONE = 1e-6
_LENGTH = 8192


def llama3_of(divisors: torch.Tensor, base: float) -> dict[str, Any] | None:
    """The rotary scaling of Llama 3 that divides the frequencies so; None if there is none.

    With F the factor, w a wavelength, and s = (L / w - low) / (high - low) cut to [0, 1], it
    divides a frequency by 1 / ((1 - s) / F + s). Only L / (high - low) and low / (high - low)
    matter, so that L may be any, and two divisors between 1 and F give the other two.

    Args:
        divisors: float64 [width / 2], of the frequencies base^(-2i / width).
        base: of the frequencies.
    """
    count = len(divisors)
    if base <= 0 or bool((divisors < 1 - _NEAR_ONE).any()):
        return None
    inverse = 1 / (2 * math.pi * base ** (torch.arange(count, dtype=torch.float64) / count))
    factor = float(divisors.max())
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    for low, high, length in _settings(inverse, share):
        cut = ((length * inverse - low) / (high - low)).clamp(0, 1)
        found = 1 / ((1 - cut) / factor + cut)
        if torch.allclose(found, divisors, rtol=_TOLERANCE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    return None


def _settings(inverse: torch.Tensor, share: torch.Tensor) -> Iterator[tuple[float, float, int]]:
    """Low, high and original length that may be meant: published ones, then what the values say."""
    yield from ((1.0, 4.0, 2**power) for power in range(10, 18))
    points = list(zip(inverse.tolist(), share.tolist(), strict=True))
    before = [(x, 1.0) for x, y in points if y >= 1 - _NEAR_ONE][-1:]
    after = [(x, 0.0) for x, y in points if y <= _NEAR_ONE][:1]
    inside = [(x, y) for x, y in points if _NEAR_ONE < y < 1 - _NEAR_ONE]
    # The line through what lies inside; with one point or none there, one that the others allow.
    line = inside if len(inside) > 1 else before + inside + after
    slopes = [(a[1] - b[1]) / (a[0] - b[0]) for a, b in pairwise(line)]
    if slopes and max(slopes) > 0:
        slope = max(slopes)
        x, y = (inside or line)[0]
        level = slope * x - y
        low = _LENGTH * level / slope
        if low > 0:
            yield low, low + _LENGTH / slope, _LENGTH
