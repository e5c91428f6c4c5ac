"""TensorRT as this project uses it, over the memory of the fake `libcuda`: ONNX Runtime computes.

An engine is the ONNX graph that it was parsed from. What the real library refuses is refused, with
a line to the logger; what it would silently get wrong (memory that is too short, freed or not
aliased) is a complaint of the fake driver, which a test reads. A name that the real bindings do not
have is not here either: `test_surface.py` compares them.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
from typing import Any

from tensorrt_calls import CALLS, SCRATCH_BYTES, Call, Tensor, driver, run
from tensorrt_config import IBuilderConfig, IOptimizationProfile, version
from tensorrt_enums import (
    NUMPY,
    TYPES,
    DataType,
    ExecutionContextAllocationStrategy,
    LayerInformationFormat,
    NetworkDefinitionCreationFlag,
    TensorLocation,
)
from tensorrt_enums import MemoryPoolType as MemoryPoolType
from tensorrt_enums import PreviewFeature as PreviewFeature
from tensorrt_enums import ProfilingVerbosity as ProfilingVerbosity
from tensorrt_plugins import IPluginRegistry, with_kernels

__version__ = version()
_VERSION = tuple(int(part) for part in __version__.split("."))
_MAGIC = b"fake plan\n"
_PIECE_BYTES = 1 << 16
_CACHE, _PRESENT = "past_key_values.", "present."


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    """Prints what matters, as the real one does on stderr."""

    def __init__(self, min_severity: ILogger.Severity = ILogger.WARNING) -> None:
        self.min_severity = min_severity

    def log(self, severity: ILogger.Severity, message: str) -> None:
        if severity <= self.min_severity:
            os.write(2, f"[TRT] {message}\n".encode())


if _VERSION < (11,):

    class IStreamReader:
        """Read on, all that is asked for."""


if _VERSION >= (10, 7):

    class IStreamReaderV2:
        """Read and seek; fewer bytes than asked for are read on."""

    class SeekPosition(enum.Enum):
        SET, CUR, END = range(3)

        def __int__(self) -> int:
            return self.value


class IExecutionContext:
    """Shapes and addresses of the next call, which a change of profile forgets."""

    def __init__(self, engine: ICudaEngine, is_user_managed: bool) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self._scratch: int | None = None
        self._own = None if is_user_managed else (ctypes.c_ubyte * SCRATCH_BYTES)()
        self._forget()

    def _forget(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._prepared: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self.engine._profiles):
            return self.engine._refuse(f"there is no profile {profile_index}")
        if profile_index != self.active_optimization_profile:
            self._forget()
        self.active_optimization_profile = profile_index
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        what = b"scratch memory"
        if size < SCRATCH_BYTES or not driver().fake_holds(memory, size, 1, what):
            driver().fake_complain(b"the scratch memory is too small")
        self._scratch = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        ends = self.engine._profiles[self.active_optimization_profile].get(name)
        if ends is None:
            return self.engine._refuse(f"there is no input '{name}'")
        least, most = ends[0], ends[2]
        fits = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            return self.engine._refuse(f"{name} {shape} is not within {least} to {most}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine._names:
            return self.engine._refuse(f"there is no tensor '{name}'")
        if memory % 256:
            return self.engine._refuse(f"the address of '{name}' is not a multiple of 256")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = [name for name in self.engine._names if name not in self._addresses]
        unshaped = [
            name
            for name in self.engine._types
            if name not in self._shapes and name in self.engine._profiles[0]
        ]
        if missing or unshaped:
            return self.engine._refuse(f"no address: {missing}; no shape: {unshaped}")
        if self._scratch is None and self._own is None:
            return self.engine._refuse("no scratch memory was given")
        self._look_at_aliases()
        if driver().fake_is_recording(stream_handle) and self._prepared != self._shapes:
            driver().fake_spoil_recording(stream_handle)
            driver().fake_complain(b"a first call with new shapes is captured")
            return self.engine._refuse("a first call with new shapes cannot be captured")
        self._prepared = dict(self._shapes)
        inputs = [
            Tensor(name, self._addresses[name], shape, self.engine._types[name])
            for name, shape in self._shapes.items()
        ]
        scratch = self._scratch or ctypes.addressof(self._own)  # type: ignore[arg-type]
        CALLS.append(Call(self.engine, inputs, dict(self._addresses), scratch))
        return driver().fake_enqueue(stream_handle, run, len(CALLS) - 1) == 0

    def _look_at_aliases(self) -> None:
        """Whether past and present are one where they must be, and two where they must not.

        The real library goes on, and is wrong.
        """
        for name in self._shapes:
            if name.startswith(_CACHE):
                present = self._addresses[name.replace(_CACHE, _PRESENT, 1)]
                if (present == self._addresses[name]) != self.engine._writes_in_place:
                    driver().fake_complain(f"'{name}' is not aliased as it must be".encode())


class ICudaEngine:
    """A graph in ONNX Runtime, with the profiles that it was built for."""

    def __init__(self, logger: ILogger, header: dict[str, Any], graph: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
        self._logger, self._profiles = logger, header["profiles"]
        self._writes_in_place: bool = header["writes_in_place"]
        found = [*self._session.get_inputs(), *self._session.get_outputs()]
        self._types = {tensor.name: NUMPY[tensor.type] for tensor in found}
        self._shapes = {
            tensor.name: [size if isinstance(size, int) else -1 for size in tensor.shape]
            for tensor in found
        }
        self._names = list(self._types)
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(self._profiles)
        self.device_memory_size_v2 = SCRATCH_BYTES

    def _refuse(self, message: str) -> bool:
        self._logger.log(ILogger.ERROR, message)
        return False

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return self._shapes[name]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._profiles[profile_index][name]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._types[name]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def create_execution_context(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> IExecutionContext:
        is_managed = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self, is_managed)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return json.dumps({"Layers": [{"LayerType": "fake"}]})


class Runtime:
    """Reads plans: from memory, or through a reader, piece by piece."""

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, source: Any) -> ICudaEngine | None:
        plan = source if isinstance(source, bytes) else _read_all(source)
        head, _, graph = plan[len(_MAGIC) :].partition(b"\n")
        why = _why_refused(plan, head, graph)
        if why is not None:
            self.logger.log(ILogger.ERROR, why)
            return None
        return ICudaEngine(self.logger, json.loads(head), graph)


def _why_refused(plan: bytes, head: bytes, graph: bytes) -> str | None:
    """What is wrong with a plan; None for nothing."""
    if not plan.startswith(_MAGIC):
        return "this is no plan"
    header = json.loads(head)
    if header["version"] != __version__:
        return f"the plan is of TensorRT {header['version']}, not {__version__}"
    if len(graph) != header["bytes"]:
        return "the plan is cut off"
    absent = set(header["plugins"]) - {creator.name for creator in _REGISTRY.all_creators}
    return f"no creator is registered for {sorted(absent)}" if absent else None


def _read_all(reader: Any) -> bytes:
    """What there is behind a reader; it is told of no end, but that nothing comes any more."""
    reads_on = "IStreamReader" in {base.__name__ for base in type(reader).__mro__}
    pieces: list[bytes] = []
    while piece := reader.read(_PIECE_BYTES) if reads_on else reader.read(_PIECE_BYTES, 0):
        pieces.append(bytes(piece))
    return b"".join(pieces)


_REGISTRY = IPluginRegistry()


def get_plugin_registry() -> IPluginRegistry:
    return _REGISTRY


# --- building ---


class INetworkDefinition:
    """The graph that was parsed, and the path that it came from."""

    def __init__(self, flags: int) -> None:
        self._is_strongly_typed = bool(
            flags & 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        )
        self._model: Any = None

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    def get_layer(self, index: int) -> Any:
        node = self._model.graph.node[index]
        registered = {creator.name for creator in _REGISTRY.all_creators}
        name = "PLUGIN_V3" if node.op_type in registered else node.op_type.upper()
        return _Named(type=_Named(name=name), name=node.name)


class _Named:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def _data_folders(model: Any, path: str) -> set[str]:
    """Where weights lie that links may lead to: TensorRT follows them, the package does not."""
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    beside = os.path.dirname(path)
    return {os.path.dirname(os.path.realpath(os.path.join(beside, name))) for name in names}


class OnnxParser:
    """Takes the opsets that this version of TensorRT knows."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._logger = network, logger
        self._errors: list[str] = []

    def parse_from_file(self, model: str) -> bool:
        import onnx

        self._network._model = onnx.load(model, load_external_data=False)
        for folder in _data_folders(self._network._model, model):
            onnx.load_external_data_for_model(self._network._model, folder)
        opset = next(o.version for o in self._network._model.opset_import if not o.domain)
        newest = 24 if _VERSION >= (10, 15) else 22
        if opset > newest:
            self._errors.append(f"opset {opset} is newer than {newest}")
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        text = self._errors[index]
        return _Named(desc=lambda: text, node_operator=lambda: "", node_name=lambda: "")


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(
        self, network: INetworkDefinition, config: IBuilderConfig
    ) -> bytes | None:
        if not network._is_strongly_typed and _VERSION < (11,):
            self.logger.log(ILogger.ERROR, "types would be chosen freely")
            return None
        inputs = {value.name for value in network._model.graph.input}
        for profile in config._profiles:
            if profile._shapes.keys() != inputs:
                self.logger.log(ILogger.ERROR, "a profile lacks an input")
                return None
        graph = with_kernels(network._model.SerializeToString())
        names = {creator.name for creator in _REGISTRY.all_creators}
        written = {"TensorScatter"}
        if PreviewFeature.ALIASED_PLUGIN_IO_10_03 in config._previews:
            written.add("CacheWrite")
        header = {
            "version": __version__,
            "profiles": [profile._shapes for profile in config._profiles],
            "plugins": sorted(names & {node.op_type for node in network._model.graph.node}),
            "writes_in_place": any(node.op_type in written for node in network._model.graph.node),
            "bytes": len(graph),
        }
        return _MAGIC + json.dumps(header).encode() + b"\n" + graph
