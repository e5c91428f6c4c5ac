"""How long the calls of a session take: what a drafter weighs its own time against."""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

# Of the last few calls: a machine's load changes.
_REMEMBERED = 9


class CallTimes:
    """How long calls of a session take, by how many tokens of a sequence they read."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(
            lambda: deque(maxlen=_REMEMBERED)
        )

    def add(self, tokens: int, seconds: float) -> None:
        """Remember a call of so many tokens."""
        self._seconds[tokens].append(seconds)

    def medians(self, most: int) -> dict[int, float]:
        """Seconds of a call by its tokens, of those of up to `most` that were seen."""
        return {n: median(found) for n, found in sorted(self._seconds.items()) if n <= most}
