"""Which layers stay in memory, and which are read from disk for every call."""

from __future__ import annotations

from collections.abc import Sequence


def resident_layers(sizes: Sequence[int], budget_bytes: int) -> frozenset[int]:
    """The layers to keep: as many as fit, in full, spread over the model.

    While one of them is computed the next layers come from the disk, which would idle if they
    stood side by side, once all buffers were full.

    Args:
        sizes: bytes of each layer, as published.
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
