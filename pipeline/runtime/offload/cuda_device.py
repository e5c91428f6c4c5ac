"""A CUDA device as `DeviceRing` sees it: a stream of its own for copies, and page-locked memory."""

from __future__ import annotations

import torch

from pipeline.errors import ResourceError
from pipeline.runtime.device.driver import Driver, HostMemory
from pipeline.runtime.torch_gpu import require_torch_gpu

# cuBLAS's workspace of 32 MiB, and what PyTorch's allocator leaves between tensors.
_LIBRARY_BYTES = 96 << 20


class CudaDevice:
    """PyTorch's current GPU; the caller computes in PyTorch's current stream.

    Attributes:
        place: of the GPU's tensors.
        library_bytes: as of a `StreamDevice`.

    Raises:
        InputError: PyTorch sees no GPU.
    """

    library_bytes = _LIBRARY_BYTES

    def __init__(self) -> None:
        require_torch_gpu("leave --device and --vram out to run on the CPU")
        self.place = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.init()
        self._driver = Driver(ordinal=torch.cuda.current_device())
        self._copies = torch.cuda.Stream(self.place)
        self._memory: list[HostMemory] = []  # whose tensors do not keep it
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited_ms = 0.0
        torch.cuda.reset_peak_memory_stats(self.place)

    @property
    def waited_s(self) -> float:
        """That computing has waited for copies, as far as that is over."""
        self._count_waits()
        return self._waited_ms / 1000

    @property
    def peak_bytes(self) -> int:
        """Most of the GPU's memory that tensors took, since this was made."""
        return torch.cuda.max_memory_allocated(self.place)

    def pinned(self, size_bytes: int) -> torch.Tensor:
        """As of a `StreamDevice`, exactly so many: PyTorch's own would be rounded up to a power.

        Raises:
            ResourceError: the system does not lock so many pages.
        """
        try:
            memory = HostMemory(self._driver, size_bytes)
        except ResourceError as error:
            raise ResourceError(
                "The system gives no more page-locked memory.",
                where="the layers that are copied to the GPU",
                observed=f"{size_bytes / 1e6:.0f} MB more than it gives",
                change="give more bytes by --vram, so that fewer layers are copied, or free memory",
            ) from error
        self._memory.append(memory)
        return torch.from_numpy(memory.content)

    def buffer(self, size_bytes: int) -> torch.Tensor:
        """As of a `StreamDevice`."""
        found = torch.empty(size_bytes, dtype=torch.uint8, device=self.place)
        found.record_stream(self._copies)
        return found

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        """As of a `StreamDevice`."""
        with torch.cuda.stream(self._copies):
            buffer.copy_(source, non_blocking=True)

    def mark_copies(self) -> torch.cuda.Event:
        """As of a `StreamDevice`."""
        return self._copies.record_event()

    def mark_compute(self) -> torch.cuda.Event:
        """As of a `StreamDevice`."""
        return torch.cuda.current_stream(self.place).record_event()

    def hold_copies(self, event: torch.cuda.Event) -> None:
        """As of a `StreamDevice`."""
        self._copies.wait_event(event)

    def hold_compute(self, event: torch.cuda.Event) -> None:
        """As of a `StreamDevice`; how long it takes is measured by the GPU."""
        stream = torch.cuda.current_stream(self.place)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        self._count_waits()
        self._waits.append((before, after))

    def finish(self) -> None:
        """As of a `StreamDevice`."""
        torch.cuda.synchronize(self.place)

    def _count_waits(self) -> None:
        """Add up the waits that are over; they end in their order."""
        over = 0
        for before, after in self._waits:
            if not after.query():
                break
            self._waited_ms += before.elapsed_time(after)
            over += 1
        del self._waits[:over]
