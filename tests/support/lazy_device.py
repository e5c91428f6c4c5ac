"""A device out of this machine's memory, whose streams do what they are allowed to, and no sooner.

What is put into a stream is done some time later, in any order that streams and events leave open,
drawn by a seed. A copy first spoils its buffer, and fills it in another step. So a wait that is
missing shows: as NaN in what is computed, or as an access that no event orders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.runtime.offload.device_ring import DeviceRing

_SPOILT = 0xFF  # bytes that are NaN in every type of floats


@dataclass
class _Event:
    """What a stream comes to."""

    is_over: bool = False
    # When it is one of computing: how much was in that stream before it.
    tick: int = 0
    # When it is one of copies: what was copied to last.
    buffer: torch.Tensor | None = None


@dataclass
class _Stream:
    """Work in its order; each piece says whether it could be done now."""

    work: deque[Callable[[], bool]] = field(default_factory=deque)

    def step(self) -> bool:
        """Do the first piece, if it can be done."""
        if not self.work or not self.work[0]():
            return False
        self.work.popleft()
        return True


class LazyDevice:
    """A `StreamDevice` for tests.

    Args:
        seed: of the order in which things are done.
        copies_first: chance that the stream of copies does something before it has to.
        deferred: whether computing waits, too; then it is what `compute` is given. If not, whatever
            the caller computes is done at once, and uses the buffer that was waited for last.

    Attributes:
        races: buffers that were to be written while the device might have computed with them.
        copies: so many were made.
    """

    place = torch.device("cpu")
    library_bytes = 0
    waited_s = 0.0

    def __init__(self, seed: int = 0, copies_first: float = 0.5, deferred: bool = False) -> None:
        self._random = np.random.default_rng(seed)
        self._copies_first, self._deferred = copies_first, deferred
        self._copying, self._computing = _Stream(), _Stream()
        self._last: torch.Tensor | None = None
        self._tick = self._seen_by_copies = 0
        self._used: dict[int, int] = {}  # address of a buffer -> when it was last computed with
        self.races: list[int] = []
        self.copies = self.peak_bytes = 0

    def pinned(self, size_bytes: int) -> torch.Tensor:
        return torch.full((size_bytes,), _SPOILT, dtype=torch.uint8)

    def buffer(self, size_bytes: int) -> torch.Tensor:
        self.peak_bytes += size_bytes
        return torch.full((size_bytes,), _SPOILT, dtype=torch.uint8)

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        if not self._deferred and self._seen_by_copies <= self._used.get(buffer.data_ptr(), -1):
            self.races.append(buffer.data_ptr())

        def spoil() -> bool:
            buffer.fill_(_SPOILT)
            return True

        def fill() -> bool:
            buffer.copy_(source)
            self.copies += 1
            return True

        self._last = buffer
        self._copying.work += [spoil, fill]
        self._go_on()

    def mark_copies(self) -> _Event:
        event = _Event(buffer=self._last)
        self._copying.work.append(lambda: _happen(event))
        self._go_on()
        return event

    def mark_compute(self) -> _Event:
        self._tick += 1
        event = _Event(tick=self._tick)
        self._computing.work.append(lambda: _happen(event))
        self._go_on()
        return event

    def hold_copies(self, event: _Event) -> None:
        self._seen_by_copies = max(self._seen_by_copies, event.tick)
        self._copying.work.append(lambda: event.is_over)
        self._go_on()

    def hold_compute(self, event: _Event) -> None:
        self._tick += 1
        if event.buffer is not None:
            self._used[event.buffer.data_ptr()] = self._tick
        self._computing.work.append(lambda: event.is_over)
        self._go_on()

    def compute(self, call: Callable[[], Any]) -> None:
        """Put something into the stream that computes."""

        def done() -> bool:
            call()
            return True

        self._computing.work.append(done)
        self._go_on()

    def finish(self) -> None:
        while self._copying.work or self._computing.work:
            self._step(0.5)

    def _go_on(self) -> None:
        """Do what has to be done by now, and perhaps more."""
        while not self._deferred and self._computing.work:
            self._step(self._copies_first)
        while self._copying.work and self._random.random() < self._copies_first:
            if not self._copying.step():
                break

    def _step(self, copies_first: float) -> None:
        """One piece of work of either stream."""
        streams = [self._computing, self._copying]
        if self._random.random() < copies_first:
            streams.reverse()
        assert any(stream.step() for stream in streams), "the streams wait for each other"


def _happen(event: _Event) -> bool:
    event.is_over = True
    return True


# --- planted faults ---


def forget(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A device that does not do what it is told by one of its methods."""
    return lambda patch: patch.setattr(LazyDevice, name, lambda self, event: None)


def release_first(patch: pytest.MonkeyPatch) -> None:
    """A ring that has a buffer filled again before anything is computed with it."""
    take = DeviceRing.take

    def taken(self: DeviceRing) -> torch.Tensor:
        buffer = take(self)
        self.release()
        return buffer

    patch.setattr(DeviceRing, "take", taken)
