"""Which layers stay where the model computes, under a budget of bytes; the others are streamed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UsageError

RING_BUFFERS = 2


@dataclass(frozen=True)
class _Residency:
    """What a budget gives.

    Attributes:
        resident: numbers of the layers that stay, in full.
        held_bytes: that those, the buffers of the others and all else take of the budget.
    """

    resident: frozenset[int]
    held_bytes: int


@dataclass(frozen=True)
class Budget:
    """Bytes that may be held, and how a message names them.

    Attributes:
        held_bytes: in all.
        flag: that they were given by.
        fixed: what is held beside layers and buffers, in words.
    """

    held_bytes: int
    flag: str
    fixed: str

    def plan(self, sizes: Sequence[int], fixed_bytes: int) -> _Residency:
        """Decide which layers stay.

        Args:
            sizes: bytes of each layer, as it is held.
            fixed_bytes: held beside layers and the buffers of those on their way.

        Raises:
            UsageError: not even the buffers fit; says what would do.
        """
        ring = RING_BUFFERS * max(sizes)
        if fixed_bytes + sum(sizes) <= self.held_bytes:
            return _Residency(frozenset(range(len(sizes))), fixed_bytes + sum(sizes))
        if fixed_bytes + ring > self.held_bytes:
            raise UsageError(
                "The budget is too small for this model, whichever layers are streamed.",
                where=self.flag,
                observed=f"{self.held_bytes / 1e6:.0f} MB",
                expected=f"at least {math.ceil((fixed_bytes + ring) / 1e6)} MB: "
                f"{ring / 1e6:.0f} for {RING_BUFFERS} layers on their way, "
                f"{fixed_bytes / 1e6:.0f} for {self.fixed}",
            )
        resident = _resident_layers(sizes, self.held_bytes - fixed_bytes - ring)
        kept = sum(sizes[number] for number in resident)
        return _Residency(resident, fixed_bytes + ring + kept)


def _resident_layers(sizes: Sequence[int], budget_bytes: int) -> frozenset[int]:
    """The layers to keep: as many as fit, in full, spread over the model.

    While one of them is computed the next layers come, which would have to wait if they stood side
    by side, once all buffers were full.

    Args:
        sizes: bytes of each layer, as it is held.
        budget_bytes: that they may take together, 0 or more.

    Returns:
        Their numbers.
    """
    total = len(sizes)
    for count in range(total, 0, -1):
        chosen = frozenset((2 * place + 1) * total // (2 * count) for place in range(count))
        if sum(sizes[number] for number in chosen) <= budget_bytes:
            return chosen
    return frozenset()
