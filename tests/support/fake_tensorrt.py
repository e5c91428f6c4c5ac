"""TensorRT and CUDA as a session sees them, without either: contexts that note what they run."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass
class FakeContext:
    """An execution context; choosing a profile forgets shapes and addresses, as TensorRT does.

    Attributes:
        runs: profile, shape of `input_ids` and address of the cache, of each call.
    """

    profile: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    runs: list[tuple[int | None, tuple[int, ...], int]] = field(default_factory=list)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        self.shapes.clear()
        self.addresses.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert self.addresses.keys() >= {*INPUTS, "logits"}
        cache = self.addresses["past_key_values.0.key"]
        self.runs.append((self.profile, self.shapes["input_ids"], cache))
        return True


@dataclass
class FakeEngine:
    """An engine whose contexts are kept, for a test to look at."""

    contexts: list[FakeContext] = field(default_factory=list)

    def create_execution_context(self) -> FakeContext:
        self.contexts.append(FakeContext())
        return self.contexts[-1]

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="FLOAT" if name not in INPUTS else "INT64")


class FakeTorch:
    """torch whose tensors on the GPU lie in this machine's memory."""

    float32, int64 = torch.float32, torch.int64

    def __init__(self) -> None:
        stream = SimpleNamespace(
            cuda_stream=0, wait_stream=lambda other: None, synchronize=lambda: None
        )
        self.cuda = SimpleNamespace(
            Stream=lambda: stream, current_stream=lambda: stream, synchronize=lambda: None
        )

    def zeros(self, size: Any, dtype: torch.dtype, device: str) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    empty = zeros

    def from_numpy(self, values: np.ndarray) -> SimpleNamespace:
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
    library = SimpleNamespace(__version__="10.0", TensorLocation=SimpleNamespace(HOST="host"))
    engine = FakeEngine()
    return _OpenEngine(manifest, library, FakeTorch(), engine), engine  # type: ignore[arg-type]
