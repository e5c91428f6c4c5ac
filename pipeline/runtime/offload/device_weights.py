"""Layers in page-locked memory, of which some stay on a device, and others are copied for a call.

A layer's matrices lie in one piece, each at an aligned place, in the type that they are computed
in: so a layer is one copy, and its matrices are views of whichever buffer that went into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from pipeline.memory import require_free_memory
from pipeline.progress import track
from pipeline.runtime.offload.device_ring import DeviceRing, StreamDevice
from pipeline.runtime.offload.residency import Budget
from pipeline.runtime.offload.stored_model import set_matrix
from pipeline.runtime.offload.traffic import Traffic

# To which a matrix's place in its slab is aligned: what a GPU's products read at once, and more.
_ALIGNMENT = 512

Shapes = Mapping[str, tuple[int, ...]]
# A layer's number and its matrices -> their numbers are there.
_Fill = Callable[[int, Mapping[str, torch.Tensor]], None]


@dataclass(frozen=True)
class _Slab:
    """Where a layer's matrices lie.

    Attributes:
        shapes: of each.
        places: first byte of each.
        size: bytes in all.
    """

    shapes: Shapes
    places: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, shapes: Shapes, dtype: torch.dtype) -> _Slab:
        places, size = {}, 0
        for name, shape in shapes.items():
            places[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return cls(shapes, places, size)

    def views(self, memory: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Each matrix, where it lies in uint8 [size] or more."""
        return {
            name: memory[place : place + math.prod(self.shapes[name]) * dtype.itemsize]
            .view(dtype)
            .view(self.shapes[name])
            for name, place in self.places.items()
        }


class DeviceWeights:
    """The numbers of a model's layers: some stay on a device, the others come by copies.

    Args:
        model: whose matrices are set.
        layers: names and shapes of the matrices of each layer.
        dtype: of them all.
        device: computes.
        budget: of its memory.
        fixed_bytes: of it that are spent otherwise.
        fill: called once for each layer, with views of the host's memory.

    Attributes:
        read_bytes: that `fill` has read from disk; for whoever fills to say.

    Raises:
        ResourceError: the host's memory does not hold the layers that are copied, or the device's
            does not hold what the budget promises.
        UsageError: the budget is too small; says what would do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[Shapes],
        dtype: torch.dtype,
        device: StreamDevice,
        budget: Budget,
        fixed_bytes: int,
        fill: _Fill,
    ) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self._slabs = [_Slab.of(shapes, dtype) for shapes in layers]
        self._plan = budget.plan([slab.size for slab in self._slabs], fixed_bytes)
        self._streamed = [n for n in range(len(layers)) if n not in self._plan.resident]
        self._pass_bytes = sum(self._slabs[n].size for n in self._streamed)
        self.read_bytes = 0
        require_free_memory(
            self._pass_bytes,
            "Memory does not hold the layers that are copied to the GPU.",
            where="--vram",
            of="page-locked, ",
            change="give more bytes by --vram, so that more layers stay on the GPU, or run it "
            "without --device, under --memory, which reads layers from disk",
        )
        pinned = self._fill_all(fill)
        self._ring = DeviceRing(device, pinned) if pinned else None

    def _fill_all(self, fill: _Fill) -> list[torch.Tensor]:
        """Give every layer its memory and its numbers: the slabs of those that are copied."""
        pinned: list[torch.Tensor] = []
        for number in track(range(len(self._slabs)), "layers"):
            slab = self._slabs[number]
            if number in self._plan.resident:
                memory = torch.empty(slab.size, dtype=torch.uint8)
            else:
                memory = self._device.pinned(slab.size)
                pinned.append(memory)
            fill(number, slab.views(memory, self._dtype))
            if number in self._plan.resident:
                kept = self._device.buffer(slab.size)
                kept.copy_(memory)
                self._set(number, kept)
        return pinned

    def traffic(self, passes: int) -> Traffic:
        """What was copied so far in so many calls, and what is held."""
        return Traffic(
            layers=len(self._slabs),
            resident=len(self._plan.resident),
            pass_bytes=self._pass_bytes,
            read_bytes=self.read_bytes,
            passes=passes,
            waited_s=self._device.waited_s,
            direct=True,
            held_bytes=self._plan.held_bytes,
            copied_bytes=0 if self._ring is None else self._ring.copied_bytes,
            pinned_bytes=self._pass_bytes,
            device_peak_bytes=self._device.peak_bytes,
        )

    def enter(self, number: int) -> None:
        """Let a layer's matrices be where its numbers are, or will be when they are read."""
        self.end_pass()
        if number not in self._plan.resident:
            assert self._ring is not None
            self._set(number, self._ring.take())

    def end_pass(self) -> None:
        """Let the buffer of the layer that was entered last be filled again."""
        if self._ring is not None:
            self._ring.release()

    def restart(self) -> None:
        """Let the next layer be the first again, whatever went wrong."""
        if self._ring is not None:
            self._ring.restart()

    def close(self) -> None:
        """Wait for what is on its way."""
        self._device.finish()

    def _set(self, number: int, memory: torch.Tensor) -> None:
        for name, view in self._slabs[number].views(memory, self._dtype).items():
            set_matrix(self._model, name, view)
