"""Bandwidth of the memory that a model is read from: of one large buffer, with the same threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

_MEBIBYTE = 1 << 20
_SMALLEST_BUFFER = 512 * _MEBIBYTE
_TIMES_THE_CACHE = 16
_READS = 6
_CACHE_SIZES = Path("/sys/devices/system/cpu")


class HostMemory:
    """A buffer in the CPU's memory, well beyond its caches, which `read` sums up.

    Args:
        threads: that read it.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name = f"sum of a buffer, {threads} threads"
        self.buffer_bytes = max(_SMALLEST_BUFFER, _TIMES_THE_CACHE * _last_level_cache_bytes())
        self._floats = torch.ones(self.buffer_bytes // 4)
        self._integers = self._floats.view(torch.int64)

    def read(self) -> float:
        """Bytes a second of the quickest of some reads, as floats and as integers."""
        sums: tuple[Callable[[], object], ...] = (self._floats.sum, self._integers.sum)
        return self.buffer_bytes / min(_seconds(call) for call in sums for _ in range(_READS // 2))


class DeviceMemory:
    """Two buffers in a GPU's memory, of which `read` copies one to the other."""

    def __init__(self) -> None:
        self.name = "copy within the GPU's memory, bytes read and written"
        self.buffer_bytes = _SMALLEST_BUFFER
        self._from = torch.ones(self.buffer_bytes // 4, device="cuda")
        self._to = torch.empty_like(self._from)

    def read(self) -> float:
        """Bytes a second, read and written, of the quickest of some copies."""
        return 2 * self.buffer_bytes / min(self._copy_s() for _ in range(_READS))

    def _copy_s(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._to.copy_(self._from)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000


def _seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _last_level_cache_bytes(folder: Path = _CACHE_SIZES) -> int:
    """Size of the largest cache of the CPU; 0 where Linux does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    largest = 0
    for path in folder.glob("cpu0/cache/index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        number = text.rstrip("KMG")
        if number.isdigit():
            largest = max(largest, int(number) * units.get(text[-1:], 1))
    return largest
