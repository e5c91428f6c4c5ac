"""An engine folder on the GPU: manifest, plugin and plan checked, the plan streamed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engine.manifest import EngineRuntime, check_manifest, read_manifest
from pipeline.engine.profiles import ShapeProfile
from pipeline.engine.target import load_library
from pipeline.engine.worker_protocol import PLAN_FILE
from pipeline.errors import InputError, MissingPackageError, ResourceError
from pipeline.export.contract import PROFILES
from pipeline.runtime.device.driver import DeviceMemory, Driver, Stream
from pipeline.runtime.sessions.engine_calls import (
    load_engine_plugin,
    read_plan,
)
from pipeline.runtime.sessions.engine_interface import require_engine_interface

if TYPE_CHECKING:
    import tensorrt as trt

_FLAVOUR = "tensorrt"
_TYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT64": "int64"}


@dataclass(frozen=True)
class OpenEngine:
    """An engine on the GPU, for sessions that take turns on one stream and one scratch memory.

    Attributes:
        manifest: of its folder.
        profiles: shapes that it runs; the first is for single tokens.
        library: its TensorRT.
        engine: the weights.
        driver: of the GPU that it is on.
        stream: on which everything happens.
        scratch: what a call needs while it runs; None where it needs nothing.
        keep: what must outlive the engine.
    """

    manifest: dict[str, Any]
    profiles: tuple[ShapeProfile, ...]
    library: Any
    engine: trt.ICudaEngine
    driver: Driver
    stream: Stream
    scratch: DeviceMemory | None
    keep: tuple[Any, ...] = ()

    @property
    def has_static_cache(self) -> bool:
        """Whether the cache is written in place, so that every step has the same shapes."""
        return PROFILES[self.manifest["onnx"]["profile"]].static_cache

    def make_context(self, profile: int) -> trt.IExecutionContext:
        """An execution context in a profile, over the scratch memory of all.

        Raises:
            ResourceError: there is no memory for one.
        """
        strategy = self.library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        if context is None:
            raise ResourceError(
                "TensorRT could not prepare the engine, most likely for lack of memory.",
                change="close other programs, or build with a smaller --max-prefill",
            )
        if self.scratch is not None:
            context.set_device_memory(self.scratch.address, self.scratch.size_bytes)
        if not context.set_optimization_profile_async(profile, self.stream.handle):
            raise ResourceError("TensorRT could not choose the profile.", observed=profile)
        self.stream.wait()
        return context

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor; raise InputError for one that nothing here makes."""
        found = self.engine.get_tensor_dtype(name).name
        if found not in _TYPES:
            raise InputError(
                f"The engine's tensor '{name}' has a type that is not supported.",
                observed=found,
                expected=", ".join(_TYPES),
            )
        return np.dtype(_TYPES[found])

    def is_on_host(self, name: str) -> bool:
        """Whether TensorRT reads a tensor from the CPU's memory, since its values decide shapes."""
        location = self.engine.get_tensor_location(name)
        return bool(location == self.library.TensorLocation.HOST)


def open_engine(
    folder: Path, driver: Driver | None = None, plugin: Path | None = None
) -> OpenEngine:
    """Load an engine, after its manifest was checked.

    Args:
        folder: what `skipcat engine` wrote for standard TensorRT.
        driver: of the GPU; None finds it.
        plugin: the block-skip library, for an engine that was built with it; None takes the one in
            the folder.

    Raises:
        InputError: there is no GPU, or the engine is not for it, this TensorRT or this plugin.
        MissingPackageError: TensorRT's Python package is missing.
        ResourceError: there is no memory for it.
    """
    flavour = read_manifest(folder)["target"].get("flavour")
    if flavour != _FLAVOUR:
        raise InputError(
            "This engine is not for standard TensorRT.",
            where=folder,
            observed=flavour,
            expected=_FLAVOUR,
            change="run it with `skipcat run` where TensorRT for RTX and torch are installed",
        )
    driver = driver or Driver()
    library = load_device_library()
    here = EngineRuntime(flavour, library.__version__, driver.capability)
    manifest = check_manifest(folder, runtime=here)
    load_engine_plugin(library, manifest, plugin, folder)
    logger = library.Logger(library.Logger.WARNING)
    runtime = library.Runtime(logger)
    engine = read_plan(library, runtime, folder / PLAN_FILE)
    profiles = tuple(ShapeProfile.from_json(entry) for entry in manifest["profiles"])
    require_engine_interface(engine, manifest, profiles[:1], folder)
    needed_bytes = int(engine.device_memory_size_v2)
    scratch = DeviceMemory(driver, needed_bytes) if needed_bytes else None
    keep = (runtime, logger)
    return OpenEngine(manifest, profiles, library, engine, driver, Stream(driver), scratch, keep)


def load_device_library() -> Any:
    """TensorRT's Python package, as JetPack or pip brings it.

    Raises:
        MissingPackageError: it is not there for this Python; says how a virtual environment sees
            JetPack's.
    """
    try:
        return load_library(_FLAVOUR, "run this engine")
    except MissingPackageError as error:
        error.details["change"] = (
            "on a Jetson: apt install python3-libnvinfer, and run the system's own python3 "
            "(a virtual environment of it needs --system-site-packages); elsewhere: pip install "
            "tensorrt"
        )
        raise
