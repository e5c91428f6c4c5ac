"""Ids, positions and mask of a call, side by side, so that one copy brings them to the GPU."""

from __future__ import annotations

import numpy as np

from pipeline.export.contract import ATTENTION_MASK, INPUT_IDS, POSITION_IDS
from pipeline.runtime.device.bound_context import BoundContext
from pipeline.runtime.device.driver import DeviceMemory, HostMemory, aligned
from pipeline.runtime.device.engine import OpenEngine

_ITEM_BYTES = np.dtype(np.int64).itemsize


class TokenInputs:
    """The three inputs that say what is read, int64, in the CPU's memory and in the GPU's.

    Args:
        opened: the engine.
        rows: sequences of a call.
        most: most tokens of a call.
        mask_length: of a mask that is padded to the cache's length; None for one that ends with
            the call's last token.

    Attributes:
        are_on_host: whether TensorRT reads one of them from the CPU's memory.
    """

    def __init__(self, opened: OpenEngine, rows: int, most: int, mask_length: int | None) -> None:
        self._opened, self._rows, self._mask_length = opened, rows, mask_length
        longest = opened.manifest["onnx"]["max_length"]
        columns = {INPUT_IDS: most, POSITION_IDS: most, ATTENTION_MASK: longest}
        self._starts, size_bytes = {}, 0
        for name, column in columns.items():
            if name in opened.profiles[0].shapes:
                self._starts[name] = size_bytes
                size_bytes += aligned(rows * column * _ITEM_BYTES)
        self._host = HostMemory(opened.driver, size_bytes)
        self._device = DeviceMemory(opened.driver, size_bytes)
        self._numbers = self._host.content.view(np.int64)
        self._on_host = {name for name in self._starts if opened.is_on_host(name)}
        self.are_on_host = bool(self._on_host)

    def fill(self, input_ids: np.ndarray, past: int) -> None:
        """Write what a call reads: int64 [rows, S] ids behind `past` tokens of each row."""
        count = input_ids.shape[1]
        total = past + count
        self._view(INPUT_IDS, count)[:] = input_ids
        if POSITION_IDS in self._starts:
            self._view(POSITION_IDS, count)[:] = np.arange(past, total)
        if ATTENTION_MASK in self._starts:
            mask = self._view(ATTENTION_MASK, self._mask_length or total)
            mask[:, :total], mask[:, total:] = 1, 0

    def bind(self, context: BoundContext, count: int, past: int) -> None:
        """Tell a context shapes and addresses of a call of `count` tokens behind `past`."""
        for name, start in self._starts.items():
            padded = self._mask_length or past + count
            context.set_shape(name, (self._rows, padded if name == ATTENTION_MASK else count))
            memory = self._host if name in self._on_host else self._device
            context.set_address(name, memory.address + start)

    def upload(self) -> None:
        """Give the copy to the stream."""
        self._opened.stream.copy_in(
            self._device.address, self._host.address, self._device.size_bytes
        )

    def _view(self, name: str, columns: int) -> np.ndarray:
        """The host's memory of an input of [rows, columns]."""
        start = self._starts[name] // _ITEM_BYTES
        return self._numbers[start : start + self._rows * columns].reshape(self._rows, columns)
