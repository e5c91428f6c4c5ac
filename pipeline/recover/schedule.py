"""Which windows a step reads and how far it goes: functions of the step alone.

Nothing is carried from one step to the next, so a resumed run needs no state of a sampler or of a
scheduler to take the same steps as one that was not interrupted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

WARMUP_FRACTION = 0.1
HELD_OUT_PART = 10


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes:
        steps: how many.
        batch_size: windows that each reads.
        learning_rate: the highest.
        seed: of the order in which windows are read.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def rate_at(self, step: int) -> float:
        """Learning rate of a step counted from 0: a linear warm-up, then half a cosine to 0."""
        warmup = max(1, round(self.steps * WARMUP_FRACTION))
        if step < warmup:
            return self.learning_rate * ((step + 1) / warmup)
        passed = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * passed))

    def windows_at(self, step: int, count: int) -> np.ndarray:
        """Indices of the windows that a step reads.

        All are read once before any is read again, in another order each time. Where the batch
        size does not divide their number, the few left over sit out this time.

        Args:
            step: counted from 0.
            count: windows there are, at least `batch_size`.

        Returns:
            int64 [batch_size], in [0, count).
        """
        epoch, place = divmod(step, count // self.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(count)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


def held_out(windows: int) -> int:
    """How many of the windows are kept for measuring: a tenth, at least one."""
    return max(1, windows // HELD_OUT_PART)


def windows_needed(steps: int, batch_size: int) -> int:
    """Fewest windows, held-out ones included, that let each step read new ones."""
    # n - held_out(n) is at least 9 n / 10, and n - 1 where n is below 10.
    return -(-steps * batch_size * HELD_OUT_PART // (HELD_OUT_PART - 1))
