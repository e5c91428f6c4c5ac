"""TensorRT for RTX as a session sees it: kernels are compiled for shapes, and found in a cache."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.runtime.sessions.rtx_kernels import RuntimeCache
from pipeline.runtime.sessions.tensorrt_session import _OpenEngine
from tests.support.fake_tensorrt import FakeContext, FakeEngine, fake_engine


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY, EAGER, NONE = range(3)


@dataclass
class IRuntimeCache:
    """Shapes that kernels are there for; of an environment, as the real one says it checks."""

    _environment: str
    _kernels: set[str] = field(default_factory=set)

    def deserialize(self, blob: bytes) -> bool:
        try:
            made = json.loads(blob)
        except ValueError:
            return False
        if made["environment"] != self._environment:
            return False
        self._kernels |= {*made["kernels"]}
        return True

    def serialize(self) -> bytes:
        made = {"environment": self._environment, "kernels": sorted(self._kernels)}
        return json.dumps(made).encode()


class IRuntimeConfig:
    """What a context is made with."""

    def __init__(self, engine: FakeRtxEngine) -> None:
        self._engine = engine
        self._strategy: str | None = None
        self._cache: IRuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy = (
            DynamicShapesKernelSpecializationStrategy.LAZY
        )

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._engine.environment)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


@dataclass
class _CompilingContext(FakeContext):
    """One that has a kernel for every shape before it runs."""

    config: Any = None
    engine: Any = None

    def execute_async_v3(self, stream: int) -> bool:
        shapes = json.dumps([self.profile, sorted(self.shapes.items())])
        cache = self.config._cache
        if cache is None or shapes not in cache._kernels:
            self.engine.compiled.append(shapes)
        if cache is not None:
            cache._kernels.add(shapes)
        return super().execute_async_v3(stream)


@dataclass
class FakeRtxEngine(FakeEngine):
    """An engine for RTX.

    Attributes:
        environment: GPU, driver and version that its kernels are for.
        compiled: shapes that a kernel was compiled for.
    """

    environment: str = "sm_86, 1.7"
    compiled: list[str] = field(default_factory=list)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self)

    def create_execution_context(self, strategy: Any) -> FakeContext:
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        assert strategy.dynamic_shapes_kernel_specialization_strategy is eager
        self.contexts.append(_CompilingContext(self.recording, config=strategy, engine=self))
        return self.contexts[-1]


def fake_rtx_engine(
    folder: Path, environment: str = FakeRtxEngine.environment
) -> tuple[_OpenEngine, FakeRtxEngine]:
    """An opened engine of a folder, and what lies behind it."""
    opened, plain = fake_engine()
    engine = FakeRtxEngine(plain.contexts, plain.graphs, plain.recording, environment)
    strategies = {DynamicShapesKernelSpecializationStrategy.__name__: (
        DynamicShapesKernelSpecializationStrategy
    )}  # fmt: skip
    library = SimpleNamespace(**vars(opened.library), **strategies)
    kernels = RuntimeCache(engine, folder)
    made: Any = dataclasses.replace(opened, library=library, engine=engine, kernels=kernels)
    return made, engine
