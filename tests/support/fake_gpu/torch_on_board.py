"""torch as a session over an engine uses it, its CUDA tensors in the memory of the fake board."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pipeline.engine.manifest import check_manifest
from pipeline.runtime.device.driver import DeviceMemory, Driver, Graph, HostMemory, Stream
from pipeline.runtime.sessions.engine_calls import load_engine_plugin
from pipeline.runtime.sessions.tensorrt_session import _OpenEngine
from tests.support.fake_gpu.board import Board

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
_COPIES: list[Callable[[], object]] = []
_CURRENT: list[_TorchStream] = []


@_CALLBACK
def _copy(number: int) -> int:
    """What the fake driver calls when a stream comes to a copy."""
    _COPIES[number]()
    return 0


class _OnBoard(torch.Tensor):
    """A tensor whose copies wait in the current stream, where there is one."""

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        into, what = (tensor.as_subclass(torch.Tensor) for tensor in (self, source))
        if _CURRENT and non_blocking:
            _CURRENT[-1].enqueue(lambda: into.copy_(what))
        else:
            into.copy_(what)
        return self


class TorchOnBoard:
    """The few functions of torch that `TensorRTSession` calls."""

    float16, float32, int64, int8 = torch.float16, torch.float32, torch.int64, torch.int8

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.cuda = SimpleNamespace(
            Stream=lambda: _TorchStream(Stream(driver)),
            current_stream=lambda: None,
            synchronize=lambda: None,
            stream=_current,
            CUDAGraph=_TorchGraph,
            graph=_recorded,
        )

    def empty(self, size: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        """Of nothing in particular, which on the fake board is NaN."""
        assert device == "cuda"
        shape = (size,) if isinstance(size, int) else tuple(size)
        return self._held(shape, dtype)

    def zeros(
        self, size: Any, dtype: torch.dtype, device: str = "cpu", pin_memory: bool = False
    ) -> torch.Tensor:
        assert pin_memory == (device == "cpu")
        shape = (size,) if isinstance(size, int) else tuple(size)
        return self._held(shape, dtype, HostMemory if pin_memory else DeviceMemory).zero_()

    def zeros_like(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.zeros(tensor.shape, dtype, device="cuda")

    def from_numpy(self, values: np.ndarray) -> SimpleNamespace:
        def to(device: str) -> torch.Tensor:
            source = torch.tensor(values)
            return self.empty(source.shape, source.dtype, device).copy_(source)

        return SimpleNamespace(to=to)

    def _held(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kind: type[DeviceMemory | HostMemory] = DeviceMemory,
    ) -> torch.Tensor:
        size_bytes = int(np.prod(shape)) * dtype.itemsize
        memory = kind(self._driver, size_bytes)
        buffer = (ctypes.c_ubyte * max(size_bytes, 1)).from_address(memory.address)
        buffer.memory = memory  # type: ignore[attr-defined]  # lives as long as the tensor
        flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size_bytes)
        return flat.view(dtype).reshape(shape).as_subclass(_OnBoard)


class _TorchStream:
    """A stream by torch's names."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.cuda_stream = stream, stream.handle

    def enqueue(self, copy: Callable[[], object]) -> None:
        import tensorrt_calls

        _COPIES.append(copy)
        tensorrt_calls.driver().fake_enqueue(self.cuda_stream, _copy, len(_COPIES) - 1)

    def wait_stream(self, other: object) -> None:
        """What torch does on the fake board is done at once."""

    def synchronize(self) -> None:
        self.stream.wait()


class _TorchGraph:
    """A graph by torch's names."""

    def replay(self) -> None:
        self.recorded.launch(_CURRENT[-1].stream)

    recorded: Graph


@contextlib.contextmanager
def _current(stream: _TorchStream) -> Iterator[None]:
    _CURRENT.append(stream)
    try:
        yield
    finally:
        _CURRENT.pop()


@contextlib.contextmanager
def _recorded(graph: _TorchGraph, stream: _TorchStream, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    stream.stream.begin_capture()
    with _current(stream):
        yield
    graph.recorded = stream.stream.end_capture()


def open_with_torch(folder: Path, board: Board) -> _OpenEngine:
    """What `open_engine` of the sessions with torch gives, without asking for a real GPU."""
    import tensorrt  # type: ignore[import-not-found]

    manifest, logger = check_manifest(folder), tensorrt.Logger()
    load_engine_plugin(tensorrt, manifest, None, folder)
    runtime = tensorrt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine((folder / "engine.plan").read_bytes())
    faked: Any = TorchOnBoard(board.driver())
    return _OpenEngine(manifest, tensorrt, faked, engine, keep=(runtime, logger))
