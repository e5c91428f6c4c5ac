"""TensorRT and CUDA as a session sees them, without either: contexts that note what they run."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pipeline.engine.profiles import Limits, ShapeProfile
from pipeline.runtime.sessions.tensorrt_session import _OpenEngine

VOCAB_SIZE, MAX_LENGTH = 16, 512
INPUTS: dict[str, tuple[int | None, ...]] = {
    "input_ids": (None, None),
    "attention_mask": (None, None),
    "position_ids": (None, None),
    "past_key_values.0.key": (None, 3, MAX_LENGTH, 64),
}
PROFILES = Limits(2, 256, MAX_LENGTH).profiles_of(INPUTS)


@dataclass(frozen=True)
class FakeRun:
    """What a context saw when it ran."""

    profile: int | None
    ids: list[list[int]]
    positions: list[list[int]]
    mask: list[list[int]]
    cache: int


@dataclass
class FakeContext:
    """An execution context; choosing a profile forgets shapes and addresses, as TensorRT does.

    It reads its inputs where it was told that they are, and answers `1000 * position + id`.

    Attributes:
        runs: of every call.
        told: how often it was told a shape or an address.
        graphs: which are being recorded, and take calls instead.
    """

    graphs: list[FakeGraph]
    profile: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    runs: list[FakeRun] = field(default_factory=list)
    told: int = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        self.shapes.clear()
        self.addresses.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        self.told += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        self.told += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.addresses.keys() >= {*INPUTS, "logits"}
        if self.graphs:
            self.graphs[-1].calls.append(self._run)
        else:
            self._run()
        return True

    def _run(self) -> None:
        ids, positions, mask = (
            self._numbers(name, ctypes.c_int64, self.shapes[name])
            for name in ("input_ids", "position_ids", "attention_mask")
        )
        cache = self.addresses["past_key_values.0.key"]
        read = (ids.tolist(), positions.tolist(), mask.tolist())
        self.runs.append(FakeRun(self.profile, *read, cache))
        logits = self._numbers("logits", ctypes.c_float, (*ids.shape, VOCAB_SIZE))
        logits[:] = (1000 * positions + ids)[..., None]

    def _numbers(self, name: str, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
        memory = (kind * math.prod(shape)).from_address(self.addresses[name])
        return np.frombuffer(memory, np.dtype(kind)).reshape(shape)


@dataclass
class FakeGraph:
    """A CUDA graph of the calls that were made while it was recorded."""

    calls: list[Callable[[], None]] = field(default_factory=list)
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            call()


@dataclass
class FakeEngine:
    """An engine whose contexts and graphs are kept, for a test to look at."""

    contexts: list[FakeContext] = field(default_factory=list)
    graphs: list[FakeGraph] = field(default_factory=list)
    recording: list[FakeGraph] = field(default_factory=list)

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "on profile change"
        self.contexts.append(FakeContext(self.recording))
        return self.contexts[-1]

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="FLOAT" if name not in INPUTS else "INT64")


class FakeTorch:
    """torch whose tensors on the GPU lie in this machine's memory.

    Args:
        engine: whose calls its graphs record.

    Attributes:
        capturable: whether recording works.
        made: how many tensors.
    """

    float32, int64 = torch.float32, torch.int64

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.capturable, self.made = True, 0
        stream = SimpleNamespace(
            cuda_stream=0, wait_stream=lambda other: None, synchronize=lambda: None
        )
        self.cuda = SimpleNamespace(
            Stream=lambda: stream, current_stream=lambda: stream, synchronize=lambda: None,
            stream=lambda chosen: nullcontext(), CUDAGraph=FakeGraph, graph=self._graph,
        )  # fmt: skip

    @contextmanager
    def _graph(self, graph: FakeGraph, **how: Any) -> Iterator[None]:
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self._engine.graphs.append(graph)
        self._engine.recording.append(graph)
        yield
        self._engine.recording.pop()

    def zeros(
        self, size: Any, dtype: torch.dtype, device: str = "cpu", pin_memory: bool = False
    ) -> torch.Tensor:
        self.made += 1
        return torch.zeros(size, dtype=dtype)

    empty = zeros

    def from_numpy(self, values: np.ndarray) -> SimpleNamespace:
        self.made += 1
        return SimpleNamespace(to=lambda device: torch.tensor(values))


def fake_engine(profiles: Sequence[ShapeProfile] = PROFILES) -> tuple[_OpenEngine, FakeEngine]:
    """An opened engine, and what lies behind it."""
    limits = {"max_batch": 2, "max_prefill": 256}
    manifest = {
        "target": {"flavour": "tensorrt"},
        "onnx": {"vocab_size": VOCAB_SIZE, "max_length": MAX_LENGTH, "profile": "opset24"},
        "limits": limits,
        "profiles": [profile.to_json() for profile in profiles],
    }
    library = SimpleNamespace(
        __version__="10.0", TensorLocation=SimpleNamespace(HOST="host"),
        ExecutionContextAllocationStrategy=SimpleNamespace(ON_PROFILE_CHANGE="on profile change"),
    )  # fmt: skip
    engine = FakeEngine()
    return _OpenEngine(manifest, library, FakeTorch(engine), engine), engine  # type: ignore[arg-type]
