"""An engine folder on an NVIDIA GPU behind the Session interface, with torch CUDA buffers.

Cache input and output of an `opset24` engine share one address, so the new slots are written in
place; the growing cache of a `compat` engine swaps between two buffers. The manifest is checked
before the plan is read.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artefact import sha256_of_file
from pipeline.engine.manifest import (
    MANIFEST_FILE,
    EngineRuntime,
    check_manifest,
    mismatch,
    read_manifest,
)
from pipeline.engine.profiles import ShapeProfile
from pipeline.engine.worker_protocol import PLAN_FILE
from pipeline.errors import InputError, MissingPackageError, ResourceError
from pipeline.export.contract import (
    ATTENTION_MASK,
    CACHE_PREFIX,
    INPUT_IDS,
    LOGITS,
    PROFILES,
    present_name,
)
from pipeline.gpu import Gpu, find_gpu
from pipeline.json_file import json_field
from pipeline.runtime.sessions.checks import CheckedSession
from pipeline.runtime.sessions.engine_interface import require_engine_interface
from pipeline.runtime.sessions.onnx_session import token_feeds

if TYPE_CHECKING:
    import tensorrt as trt
    import torch

_MODULES = {
    "rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13", "rtx"),
    "tensorrt": ("tensorrt", "tensorrt", "trt"),
}


@dataclass(frozen=True)
class _OpenEngine:
    """An engine that TensorRT has loaded, for any number of execution contexts.

    Contexts may be in the same profile at the same time: so it is since TensorRT 10.

    Attributes:
        manifest: of the engine folder.
        library: the engine's TensorRT.
        torch: whose tensors it works on.
        engine: the weights, on the GPU.
        keep: what must outlive the engine.
    """

    manifest: dict[str, Any]
    library: Any
    torch: Any
    engine: trt.ICudaEngine
    keep: tuple[Any, ...] = ()

    def make_context(self) -> trt.IExecutionContext:
        """An execution context; on RTX with kernels compiled for each shape before it runs.

        RTX's default compiles them in the background and answers with a fallback kernel meanwhile,
        so the same tokens could give other logits a second later.

        Raises:
            ResourceError: there is no memory for one.
        """
        if self.manifest["target"]["flavour"] != "rtx":
            return _require_context(self.engine.create_execution_context())
        config: Any = self.engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = (
            self.library.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        return _require_context(self.engine.create_execution_context(config))


def open_engine(
    folder: Path, onnx_folder: Path | None = None, plugin: Path | None = None
) -> _OpenEngine:
    """Load an engine, after its manifest was checked.

    Args:
        folder: what `skipcat engine` wrote.
        onnx_folder: when given, the engine must have been built from it.
        plugin: the block-skip library, for an engine that was built with it.

    Raises:
        InputError: no GPU here, or the engine is not for this GPU, library, plugin or ONNX folder.
        MissingPackageError: torch with CUDA, or the engine's TensorRT, is not installed.
    """
    gpu = _require_gpu(folder)
    path = folder / MANIFEST_FILE
    flavour = json_field(read_manifest(folder)["target"], "flavour", str, path)
    library = _load_library(flavour)
    manifest = check_manifest(
        folder, onnx_folder, EngineRuntime(flavour, library.__version__, gpu.capability)
    )
    torch = _require_cuda_torch()
    _load_engine_plugin(library, manifest, plugin, folder)
    logger = library.Logger(library.Logger.WARNING)
    runtime = library.Runtime(logger)
    engine = _read_engine(runtime, folder)
    return _OpenEngine(manifest, library, torch, engine, (runtime, logger))


class TensorRTSession(CheckedSession):
    """A TensorRT or TensorRT for RTX engine.

    Args:
        folder, onnx_folder, plugin: as `open_engine` takes them; it raises what that raises.
        name: what the ledger calls this backend; None makes one out of flavour and version.
        engine: the same folder's, where another session has opened it; None opens it.
    """

    def __init__(
        self,
        folder: Path,
        onnx_folder: Path | None = None,
        plugin: Path | None = None,
        name: str | None = None,
        engine: _OpenEngine | None = None,
    ) -> None:
        self._opened = engine or open_engine(folder, onnx_folder, plugin)
        self._folder, self.manifest = folder, self._opened.manifest
        self._torch, self._library = self._opened.torch, self._opened.library
        self._engine = self._opened.engine
        flavour = self.manifest["target"]["flavour"]
        self.name = name or f"{flavour} {self._library.__version__}"
        self.vocab_size: int = self.manifest["onnx"]["vocab_size"]
        self.max_length: int = self.manifest["onnx"]["max_length"]
        self.max_rows: int | None = self.manifest["limits"]["max_batch"]
        self._profiles = [ShapeProfile.from_json(entry) for entry in self.manifest["profiles"]]
        if engine is None:
            require_engine_interface(self._engine, self.manifest, self._profiles[:1], folder)
        self._context = self._opened.make_context()
        self._stream = self._torch.cuda.Stream()
        self._active_profile: int | None = None
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reset()

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; their slots are written anew before use."""
        self._length = min(self._length, length)
        if length == 0:
            self.reset()

    def sibling(self) -> TensorRTSession:
        """A session over the same engine, with a context, its profile and a cache of its own."""
        return TensorRTSession(self._folder, name=self.name, engine=self._opened)

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        """As every session's; ResourceError says that TensorRT could not run the call."""
        rows, count = self._check_call(input_ids)
        if self._rows is None:
            self._start_cache(rows)
        pieces: list[np.ndarray] = []
        for start, stop in _split_call(count, self.manifest["limits"]["max_prefill"]):
            logits = self._run(input_ids[:, start:stop])
            pieces = [logits[:, -1:]] if last_only else [*pieces, logits]
            self._length += stop - start
        self._rows = rows
        return np.concatenate(pieces, axis=1)

    def _check_rows(self, rows: int) -> None:
        """Raise InputError for more rows than the engine was built for, too."""
        super()._check_rows(rows)
        _require_rows(rows, self.manifest["limits"]["max_batch"], self.name)

    def _start_cache(self, rows: int) -> None:
        """Zeroed buffers for `rows` sequences: a stale NaN would survive a mask of zero weight."""
        names = [name for name in self._profiles[0].shapes if name.startswith(CACHE_PREFIX)]
        self._buffers = {name: self._make_buffers(name, rows) for name in names}
        self._torch.cuda.synchronize()

    def _make_buffers(self, name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat memory of a cache tensor and of its successor: the same when written in place."""
        _, heads, _, width = self._profiles[0].shapes[name].max
        size = rows * heads * self.max_length * width
        dtype = self._dtype(name)
        first = self._torch.zeros(size, dtype=dtype, device="cuda")
        if self._in_place:
            return first, first
        return first, self._torch.zeros(size, dtype=dtype, device="cuda")

    @property
    def _in_place(self) -> bool:
        """Whether present is past, updated by TensorScatter."""
        return PROFILES[self.manifest["onnx"]["profile"]].static_cache

    def _run(self, input_ids: np.ndarray) -> np.ndarray:
        """One call of the engine: float32 logits [B, S, V]; the cache moves on."""
        rows, count = input_ids.shape
        feeds = {
            name: self._torch.from_numpy(values).to(self._device(name))
            for name, values in token_feeds(input_ids, self._length).items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        shapes |= {name: self._cache_shape(name, rows) for name in self._buffers}
        logits = self._torch.empty(
            (rows, count, self.vocab_size), dtype=self._dtype(LOGITS), device="cuda"
        )
        # The copies above ran on torch's current stream.
        self._stream.wait_stream(self._torch.cuda.current_stream())
        self._select(_pick_profile(self._profiles, shapes))
        self._bind(shapes, feeds, logits)
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ResourceError("TensorRT could not run the engine.", where=self.name)
        self._stream.synchronize()
        if not self._in_place:
            self._buffers = {name: (new, old) for name, (old, new) in self._buffers.items()}
        answer: np.ndarray = logits.float().cpu().numpy()
        return answer

    def _cache_shape(self, name: str, rows: int) -> tuple[int, ...]:
        """Shape of a cache input for this call."""
        _, heads, _, width = self._profiles[0].shapes[name].max
        return (rows, heads, self.max_length if self._in_place else self._length, width)

    def _select(self, index: int) -> None:
        """Make a profile the active one; it forgets all shapes and addresses."""
        if index == self._active_profile:
            return
        handle = self._stream.cuda_stream
        if not self._context.set_optimization_profile_async(index, handle):
            raise ResourceError("TensorRT could not switch the profile.", where=self.name)
        self._stream.synchronize()
        self._active_profile = index

    def _bind(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        feeds: Mapping[str, torch.Tensor],
        logits: torch.Tensor,
    ) -> None:
        """Give the context every shape and address of this call."""
        addresses = {name: tensor.data_ptr() for name, tensor in feeds.items()}
        addresses[LOGITS] = logits.data_ptr()
        for name, (past, present) in self._buffers.items():
            addresses[name] = past.data_ptr()
            addresses[present_name(name)] = present.data_ptr()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise InputError(
                    f"The engine refuses the shape of '{name}'.", where=self.name, observed=shape
                )
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise InputError(f"The engine has no tensor '{name}'.", where=self.name)

    def _device(self, name: str) -> str:
        """Where TensorRT wants a tensor: values that decide shapes are read on the host."""
        location = self._engine.get_tensor_location(name)
        return "cpu" if location == self._library.TensorLocation.HOST else "cuda"

    def _dtype(self, name: str) -> torch.dtype:
        """The torch type of an engine tensor."""
        dtypes = {
            "HALF": "float16", "FLOAT": "float32", "BF16": "bfloat16", "INT64": "int64",
            "INT8": "int8",
        }  # fmt: skip
        dtype: torch.dtype = getattr(self._torch, dtypes[self._engine.get_tensor_dtype(name).name])
        return dtype


def _require_gpu(folder: Path) -> Gpu:
    """The GPU of this machine; raise InputError when there is none."""
    gpu = find_gpu()
    if gpu is None:
        raise InputError(
            "no NVIDIA GPU: the engine was built ahead of time and cannot run on this machine",
            where=folder,
            change="copy the folder to a machine with the GPU it is for, or run the ONNX folder "
            "with ONNX Runtime",
        )
    return gpu


def _load_library(flavour: str) -> Any:
    """The engine's TensorRT; raise MissingPackageError when it is not installed."""
    module, package, extra = _MODULES[flavour]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(package, extra, "run this engine") from error


def _require_cuda_torch() -> Any:
    """The module torch; raise InputError when it cannot use the GPU."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "PyTorch cannot use the GPU of this machine.",
            observed=f"torch {torch.__version__}",
            change="install a CUDA build of torch (on Jetson: NVIDIA's wheel)",
        )
    return torch


def _load_engine_plugin(
    library: Any, manifest: Mapping[str, Any], plugin: Path | None, folder: Path
) -> None:
    """Load the plugin that the engine was built with; nothing for an engine without one.

    Raises:
        InputError: it is not given, or is not that library.
    """
    record = manifest["block_skip"]["plugin"]
    if record is None:
        return
    path = plugin or folder / record["library"]
    if not path.is_file():
        raise InputError(
            "This engine was built with a plugin library, which is missing.",
            where=folder,
            expected=f"{record['library']}, sha256 {record['sha256']}",
            change="put the library into the engine folder, or name it",
        )
    digest = sha256_of_file(path)
    if digest != record["sha256"]:
        raise mismatch("plugin library", path, digest, record["sha256"])
    if library.get_plugin_registry().load_library(str(path)) is None:
        raise InputError("TensorRT cannot load this plugin library.", where=path)


def _read_engine(runtime: trt.Runtime, folder: Path) -> trt.ICudaEngine:
    """Deserialise the plan; raise InputError when TensorRT refuses it."""
    engine = runtime.deserialize_cuda_engine((folder / PLAN_FILE).read_bytes())
    if engine is None:
        raise InputError(
            "TensorRT refuses this plan; it said why above.",
            where=folder / PLAN_FILE,
            change="build the engine again on this machine",
        )
    return engine


def _require_context(context: trt.IExecutionContext | None) -> trt.IExecutionContext:
    """The context; raise ResourceError when TensorRT could not make one."""
    if context is None:
        raise ResourceError(
            "TensorRT could not prepare the engine, most likely for lack of GPU memory.",
            change="close other programs on the GPU, or build with a smaller --max-prefill",
        )
    return context


def _require_rows(rows: int, max_batch: int, where: str) -> None:
    """Raise InputError for more rows than the engine was built for."""
    if rows > max_batch:
        raise InputError(
            "More rows than the engine takes.",
            where=where,
            observed=f"{rows} rows",
            expected=f"at most {max_batch}",
            change="build the engine again with a larger --max-batch",
        )


def _split_call(count: int, longest: int) -> list[tuple[int, int]]:
    """[start, stop) of the pieces of a call of `count` tokens, each at most `longest`."""
    return [(start, min(start + longest, count)) for start in range(0, count, longest)]


def _pick_profile(profiles: Sequence[ShapeProfile], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Index of the first profile that admits all shapes; decode comes first.

    Raises:
        InputError: none does.
    """
    for index, profile in enumerate(profiles):
        if all(_admits(profile, name, shape) for name, shape in shapes.items()):
            return index
    raise InputError(
        "No profile of the engine admits this call.",
        observed={name: shapes[name] for name in (INPUT_IDS, ATTENTION_MASK) if name in shapes},
        change="build the engine again with larger limits",
    )


def _admits(profile: ShapeProfile, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a profile covers one tensor's shape."""
    ends = profile.shapes[name]
    return len(shape) == len(ends.min) and all(
        low <= size <= high for low, size, high in zip(ends.min, shape, ends.max, strict=True)
    )
