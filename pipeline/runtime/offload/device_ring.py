"""A ring of a device's buffers, into which layer after layer is copied ahead of whoever computes.

Nothing here waits. Copies are put into one stream and computing into another, and two events a
buffer hold them apart: it is filled before it is computed with, and released before it is filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pipeline.runtime.offload.residency import RING_BUFFERS


class StreamDevice(Protocol):
    """A device's memory, a stream of copies into it, and the one in which the caller computes.

    Attributes:
        place: where tensors of its memory are.
        library_bytes: of its memory, that libraries take for themselves.
        waited_s: that computing has waited for copies.
        peak_bytes: most that was held of its memory.
    """

    place: torch.device
    library_bytes: int

    @property
    def waited_s(self) -> float: ...

    @property
    def peak_bytes(self) -> int: ...

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """uint8 [size] of the host's memory, from which the device copies by itself."""

    def buffer(self, size_bytes: int) -> torch.Tensor:
        """uint8 [size] of the device's memory."""

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        """Put a copy into the stream of copies."""

    def mark_copies(self) -> Any:
        """An event that happens when all copies so far are done."""

    def mark_compute(self) -> Any:
        """An event that happens when all that was computed so far is done."""

    def hold_copies(self, event: Any) -> None:
        """Let later copies wait for an event."""

    def hold_compute(self, event: Any) -> None:
        """Let what is computed later wait for an event."""

    def finish(self) -> None:
        """Wait for both streams, as before memory is given back."""


class DeviceRing:
    """Layers in their order, again and again, each on its way before it is asked for.

    Args:
        device: copies and computes.
        slabs: of each layer, at least one, page-locked, uint8.

    Attributes:
        copied_bytes: so far, or on their way.
    """

    def __init__(self, device: StreamDevice, slabs: Sequence[torch.Tensor]) -> None:
        self.copied_bytes = 0
        self._device, self._slabs = device, list(slabs)
        size = max(len(slab) for slab in slabs)
        self._buffers = [device.buffer(size) for _ in range(RING_BUFFERS)]
        self._taken: torch.Tensor | None = None
        self._filled: deque[tuple[torch.Tensor, Any]] = deque()
        self.restart()

    def take(self) -> torch.Tensor:
        """The buffer with the next layer, for what is computed between this and `release`."""
        buffer, filled = self._filled.popleft()
        self._device.hold_compute(filled)
        self._taken = buffer
        return buffer

    def release(self) -> None:
        """Have the buffer that was taken filled again, once what was computed with it is done."""
        if self._taken is not None:
            self._fill(self._taken)
            self._taken = None

    def restart(self) -> None:
        """Begin with the first layer again, whatever was taken."""
        self._turn = 0
        self._taken = None
        self._filled.clear()
        for buffer in self._buffers:
            self._fill(buffer)

    def _fill(self, buffer: torch.Tensor) -> None:
        released = self._device.mark_compute()
        self._device.hold_copies(released)
        slab = self._slabs[self._turn]
        self._turn = (self._turn + 1) % len(self._slabs)
        self._device.copy(buffer[: len(slab)], slab)
        self.copied_bytes += len(slab)
        self._filled.append((buffer, self._device.mark_copies()))
