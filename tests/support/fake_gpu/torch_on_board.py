"""torch as a session over an engine uses it, its CUDA tensors in the memory of the fake board."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pipeline.engine.manifest import check_manifest
from pipeline.runtime.device.driver import DeviceMemory, Driver, Stream
from pipeline.runtime.sessions.tensorrt_session import _OpenEngine
from tests.support.fake_gpu.board import Board


class TorchOnBoard:
    """The few functions of torch that `TensorRTSession` calls."""

    float16, float32, int64, int8 = torch.float16, torch.float32, torch.int64, torch.int8

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.cuda = SimpleNamespace(
            Stream=lambda: _TorchStream(Stream(driver)),
            current_stream=lambda: None,
            synchronize=lambda: None,
        )

    def empty(self, size: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        """Of nothing in particular, which on the fake board is NaN."""
        assert device == "cuda"
        shape = (size,) if isinstance(size, int) else tuple(size)
        return self._held(shape, dtype)

    def zeros(self, size: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        return self.empty(size, dtype, device).zero_()

    def from_numpy(self, values: np.ndarray) -> SimpleNamespace:
        def to(device: str) -> torch.Tensor:
            source = torch.tensor(values)
            return self.empty(source.shape, source.dtype, device).copy_(source)

        return SimpleNamespace(to=to)

    def _held(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        memory = DeviceMemory(self._driver, size_bytes)
        buffer = (ctypes.c_ubyte * max(size_bytes, 1)).from_address(memory.address)
        buffer.memory = memory  # type: ignore[attr-defined]  # lives as long as the tensor
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size_bytes)
        return flat.view(dtype).reshape(shape)


class _TorchStream:
    """A stream by torch's names."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.cuda_stream = stream, stream.handle

    def wait_stream(self, other: object) -> None:
        """What torch does on the fake board is done at once."""

    def synchronize(self) -> None:
        self._stream.wait()


def open_with_torch(folder: Path, board: Board) -> _OpenEngine:
    """What `open_engine` of the sessions with torch gives, without asking for a real GPU."""
    import tensorrt  # type: ignore[import-not-found]

    logger = tensorrt.Logger()
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine((folder / "engine.plan").read_bytes())
    faked: Any = TorchOnBoard(board.driver())
    return _OpenEngine(check_manifest(folder), tensorrt, faked, engine, (runtime, logger))
