"""Calls of engines of the fake TensorRT, on the addresses of the fake `libcuda`."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np

SCRATCH_BYTES = 4096


@functools.cache
def driver() -> ctypes.CDLL:
    driver = ctypes.CDLL(os.environ.get("FAKE_LIBCUDA", "libcuda.so.1"))
    driver.fake_holds.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p,
    ]  # fmt: skip
    driver.fake_enqueue.argtypes = [ctypes.c_void_p, _CALLBACK, ctypes.c_int]
    driver.fake_is_recording.argtypes = driver.fake_spoil_recording.argtypes = [ctypes.c_void_p]
    driver.fake_complain.argtypes = [ctypes.c_char_p]
    return driver


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
CALLS: list[Call] = []


@_CALLBACK
def run(number: int) -> int:
    """What the fake driver calls when a stream comes to a call of an engine."""
    try:
        CALLS[number].run()
    except Exception as error:
        driver().fake_complain(f"{type(error).__name__}: {error}".encode())
        return 700
    return 0


class Tensor:
    """Numbers at an address: of the fake GPU, or of the CPU."""

    def __init__(self, name: str, address: int, shape: tuple[int, ...], dtype: Any) -> None:
        self.name, self.address, self.shape = name, address, shape
        self.dtype = np.dtype(dtype)
        self.size_bytes = int(np.prod(shape)) * self.dtype.itemsize

    def is_held(self) -> bool:
        what = f"tensor '{self.name}' {list(self.shape)}".encode()
        return bool(driver().fake_holds(self.address, self.size_bytes, 1, what))

    def numbers(self) -> np.ndarray:
        memory = (ctypes.c_ubyte * self.size_bytes).from_address(self.address)
        return np.frombuffer(memory, self.dtype).reshape(self.shape)


class Call:
    """One call of an engine, as it was when it was enqueued."""

    def __init__(
        self, engine: Any, inputs: list[Tensor], addresses: dict[str, int], scratch: int
    ) -> None:
        self._engine, self._inputs, self._addresses = engine, inputs, addresses
        self._scratch = scratch

    def run(self) -> None:
        assert all(tensor.is_held() for tensor in self._inputs), "an input is not there"
        feeds = {tensor.name: tensor.numbers().copy() for tensor in self._inputs}
        names = [name for name in self._engine._names if name not in feeds]
        ctypes.memset(self._scratch, 0xFF, SCRATCH_BYTES)
        results = self._engine._session.run(names, feeds)
        for name, result in zip(names, results, strict=True):
            target = Tensor(name, self._addresses[name], result.shape, result.dtype)
            assert target.is_held(), "an output has no room"
            target.numbers()[...] = result
