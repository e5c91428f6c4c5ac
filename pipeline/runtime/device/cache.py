"""Keys and values on the GPU: written in place, or grown from one memory into another.

A static cache (`opset24`) has one address and one shape for ever, so that a step can be captured. A
growing one (`compat`) is a longer tensor after every call, at another address.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate, product

import numpy as np

from pipeline.export.contract import CACHE_PREFIX, present_name
from pipeline.runtime.device.bound_context import BoundContext
from pipeline.runtime.device.driver import DeviceMemory, aligned
from pipeline.runtime.device.engine import OpenEngine


class _Tensors:
    """The cache tensors of so many rows, side by side in one memory.

    Args:
        opened: the engine.
        rows: sequences.

    Attributes:
        shapes: [rows, heads, max_length, width] of each, by the name of the input.
        dtypes: of each.
    """

    def __init__(self, opened: OpenEngine, rows: int) -> None:
        inputs = opened.profiles[0].shapes
        names = [name for name in inputs if name.startswith(CACHE_PREFIX)]
        length = opened.manifest["onnx"]["max_length"]
        sizes = {name: inputs[name].max for name in names}
        self.shapes = {
            name: (rows, heads, length, width) for name, (_, heads, _, width) in sizes.items()
        }
        self.dtypes: Mapping[str, np.dtype] = {name: opened.dtype(name) for name in names}
        self._opened = opened

    def make(self) -> tuple[DeviceMemory, dict[str, int]]:
        """Memory for all, zeroed, and where in it each begins.

        Zeros, since a masked place has weight 0, and 0 times what memory happens to hold is not 0.
        """
        bytes_of = [
            aligned(int(np.prod(shape)) * self.dtypes[name].itemsize)
            for name, shape in self.shapes.items()
        ]
        memory = DeviceMemory(self._opened.driver, sum(bytes_of))
        starts = accumulate(bytes_of, initial=memory.address)
        self._opened.stream.clear(memory.address, memory.size_bytes)
        return memory, dict(zip(self.shapes, starts, strict=False))


class StaticCache:
    """A cache of fixed length, which TensorRT writes in place: past and present are one address."""

    def __init__(self, opened: OpenEngine, rows: int) -> None:
        self._opened, self._tensors = opened, _Tensors(opened, rows)
        self._memory, self._addresses = self._tensors.make()

    def bind(self, context: BoundContext, past: int) -> None:
        """Tell a context where the cache is; the same for every number of tokens in it."""
        for name, address in self._addresses.items():
            context.set_shape(name, self._tensors.shapes[name])
            context.set_address(name, address)
            context.set_address(present_name(name), address)

    def advance(self) -> None:
        """A call has run: nothing moves."""

    def rewind(self, past: int, length: int) -> None:
        """Keep `length` of `past` tokens; what stands behind them is written anew before use."""

    def clear(self) -> None:
        """Zeros again, for a sequence of its own."""
        self._opened.stream.clear(self._memory.address, self._memory.size_bytes)


class GrowingCache:
    """A cache that each call writes, with its tokens behind, into the other one of two memories."""

    def __init__(self, opened: OpenEngine, rows: int) -> None:
        self._opened, self._tensors = opened, _Tensors(opened, rows)
        self._past, self._present = self._tensors.make(), self._tensors.make()

    def bind(self, context: BoundContext, past: int) -> None:
        """Tell a context where the `past` tokens are, and where they and the new ones go."""
        for name, (rows, heads, _, width) in self._tensors.shapes.items():
            context.set_shape(name, (rows, heads, past, width))
            context.set_address(name, self._past[1][name])
            context.set_address(present_name(name), self._present[1][name])

    def advance(self) -> None:
        """A call has run: what it wrote is the past of the next."""
        self._past, self._present = self._present, self._past

    def rewind(self, past: int, length: int) -> None:
        """Keep `length` of `past` tokens: each head's move together, into the other memory."""
        for name, old_bytes, new_bytes, number in self._heads(past, length):
            self._opened.stream.copy_within(
                self._present[1][name] + number * new_bytes,
                self._past[1][name] + number * old_bytes,
                new_bytes,
            )
        self._opened.stream.wait()
        self.advance()

    def clear(self) -> None:
        """Nothing: a cache of no tokens holds nothing."""

    def _heads(self, past: int, length: int) -> Iterator[tuple[str, int, int, int]]:
        """Each head of each row: its tensor, bytes of it before and after, and its number."""
        for name, (rows, heads, _, width) in self._tensors.shapes.items():
            token_bytes = width * self._tensors.dtypes[name].itemsize
            for row, head in product(range(rows), range(heads)):
                yield name, past * token_bytes, length * token_bytes, row * heads + head
