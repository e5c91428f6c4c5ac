"""Keys and values as the calls of an offloaded model see them: in memory, or on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.runtime.offload.steady_attention import Held, Part
from pipeline.runtime.sessions.key_values import KeyValues


class HostCache:
    """The memory of a `KeyValues` itself.

    Args:
        values: that a draft may share.
    """

    def __init__(self, values: KeyValues) -> None:
        self._values = values
        self._bound: object = None
        self._tensors: list[Held] = []

    def tensors(self) -> list[Held]:
        """Keys and values of each layer."""
        if self._bound is not self._values.buffers:  # there are more rows now
            self._bound = self._values.buffers
            tensors = [torch.from_numpy(buffer) for buffer in self._values.buffers.values()]
            self._tensors = list(zip(tensors[::2], tensors[1::2], strict=True))
        return self._tensors

    def tell(self, parts: Sequence[Part]) -> None:
        """Nothing: what a call wrote is there."""

    def trial(self, slots: int) -> HostCache:
        """Another cache of so many rows, to try the first layer with."""
        return HostCache(self._values.like(slots))


class DeviceCache:
    """Keys and values on a device, of which a `KeyValues` may have a copy.

    Args:
        values: says how many rows there are, and has the copy.
        like: of the type and on the device that the model computes with.
        is_shared: whether there is a copy: what every call wrote, for a draft to read.

    Attributes:
        place: the device.
    """

    def __init__(self, values: KeyValues, like: torch.Tensor, is_shared: bool) -> None:
        self._values, self._like, self._is_shared = values, like, is_shared
        self.place = like.device
        self._tensors: list[Held] = []

    def tensors(self) -> list[Held]:
        """Keys and values of each layer."""
        held = len(self._tensors[0][0]) if self._tensors else 0
        if held != self._values.slots:
            old, shapes = self._tensors, [b.shape for b in self._values.buffers.values()]
            self._tensors = [
                (self._like.new_zeros(keys), self._like.new_zeros(values))
                for keys, values in zip(shapes[::2], shapes[1::2], strict=True)
            ]
            for before, now in zip(old, self._tensors, strict=False):
                for place in range(2):
                    now[place][:held] = before[place]
        return self._tensors

    def tell(self, parts: Sequence[Part]) -> None:
        """Copy what a call wrote to where a draft looks for it."""
        if not self._is_shared:
            return
        flat = [tensor for pair in self._tensors for tensor in pair]
        for part in parts:
            places = slice(part.start, part.start + len(part.branches[0]))
            for buffer, own in zip(self._values.buffers.values(), flat, strict=True):
                buffer[part.slot, :, places] = own[part.slot, :, places].float().cpu().numpy()

    def trial(self, slots: int) -> DeviceCache:
        """Another cache of so many rows, whose layers share memory: to try the first layer with."""
        made = DeviceCache(self._values.like(slots), self._like, False)
        keys, values, *rest = (buffer.shape for buffer in made._values.buffers.values())
        pair = (self._like.new_zeros(keys), self._like.new_zeros(values))
        made._tensors = [pair] * (1 + len(rest) // 2)
        return made
