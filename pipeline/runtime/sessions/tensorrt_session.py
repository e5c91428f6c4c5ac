"""An engine folder on an NVIDIA GPU behind the Session interface, with torch CUDA buffers.

Cache input and output of an `opset24` engine share one address, so the new slots are written in
place, and a step of one token is a CUDA graph (`engine_step.py`); the growing cache of a `compat`
engine swaps between two buffers. The manifest is checked before the plan is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engine.manifest import (
    MANIFEST_FILE,
    EngineRuntime,
    check_manifest,
    read_manifest,
)
from pipeline.engine.profiles import ShapeProfile
from pipeline.engine.target import load_library
from pipeline.engine.worker_protocol import PLAN_FILE
from pipeline.errors import InputError, ResourceError
from pipeline.export.contract import (
    ATTENTION_MASK,
    CACHE_PREFIX,
    LOGITS,
    PROFILES,
    TOKEN_INPUTS,
    present_name,
)
from pipeline.gpu import Gpu, find_gpu
from pipeline.json_file import json_field
from pipeline.runtime.sessions.checks import CheckedSession
from pipeline.runtime.sessions.engine_calls import (
    load_engine_plugin,
    pick_profile,
    read_plan,
    require_rows,
    split_call,
)
from pipeline.runtime.sessions.engine_interface import require_engine_interface
from pipeline.runtime.sessions.engine_step import EngineStep
from pipeline.runtime.sessions.onnx_session import token_feeds
from pipeline.runtime.sessions.rtx_kernels import RuntimeCache

if TYPE_CHECKING:
    import tensorrt as trt
    import torch


@dataclass(frozen=True)
class _OpenEngine:
    """An engine that TensorRT has loaded, for any number of execution contexts.

    Contexts may be in the same profile at the same time: so it is since TensorRT 10.

    Attributes:
        manifest: of the engine folder.
        library: the engine's TensorRT.
        torch: whose tensors it works on.
        engine: the weights, on the GPU.
        kernels: that were compiled for it; None where the plan holds its kernels.
        keep: what must outlive the engine.
    """

    manifest: dict[str, Any]
    library: Any
    torch: Any
    engine: trt.ICudaEngine
    kernels: RuntimeCache | None = None
    keep: tuple[Any, ...] = ()

    def make_context(self, profile: int, stream: int) -> trt.IExecutionContext:
        """A context in a profile, with scratch memory for that one alone.

        On RTX kernels are compiled for each shape before it runs. Its default compiles them in the
        background and answers with a fallback kernel meanwhile, so the same tokens could give other
        logits a second later.

        Raises:
            ResourceError: there is no memory for one.
        """
        strategy = self.library.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self.kernels is not None:
            config: Any = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.library.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self.kernels.lend(config)
            context = self.engine.create_execution_context(config)
        else:
            context = self.engine.create_execution_context(strategy)
        if context is None or not context.set_optimization_profile_async(profile, stream):
            raise ResourceError(
                "TensorRT could not prepare the engine, most likely for lack of GPU memory.",
                change="close other programs on the GPU, or build with a smaller --max-prefill",
            )
        return context


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
    library = load_library(flavour, "run this engine")
    manifest = check_manifest(
        folder, onnx_folder, EngineRuntime(flavour, library.__version__, gpu.capability)
    )
    torch = _require_cuda_torch()
    load_engine_plugin(library, manifest, plugin, folder)
    logger = library.Logger(library.Logger.WARNING)
    runtime = library.Runtime(logger)
    # How the reader of TensorRT for RTX behaves has not been seen.
    engine = read_plan(library, runtime, folder / PLAN_FILE, streams=flavour != "rtx")
    kernels = RuntimeCache(engine, folder) if flavour == "rtx" else None
    return _OpenEngine(manifest, library, torch, engine, kernels, (runtime, logger))


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
        self._stream = self._torch.cuda.Stream()
        handle = self._stream.cuda_stream
        # One for each profile: choosing another forgets all shapes and addresses, and the graph.
        self._contexts = [
            self._opened.make_context(index, handle) for index in range(len(self._profiles))
        ]
        self._kernels = self._opened.kernels  # to be let go after the contexts
        self._stream.synchronize()
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._step: EngineStep | None = None
        self._made_for: int | None = None
        self.reset()

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; slots in place are written before their use."""
        if length == 0:
            self.reset()
        elif length < self._length:
            if not self._in_place and self._rows is not None:
                self._move_heads(self._rows, length)
            self._length = length

    def _move_heads(self, rows: int, length: int) -> None:
        """Lay the first `length` tokens of every head of a growing cache side by side."""
        for name, (past, present) in self._buffers.items():
            _, heads, _, width = self._profiles[0].shapes[name].max
            before, after = ((rows, heads, n, width) for n in (self._length, length))
            kept = past[: math.prod(before)].view(before)[:, :, :length]
            present[: math.prod(after)].view(after).copy_(kept)
        self._swap()
        self._torch.cuda.synchronize()

    def _swap(self) -> None:
        """What was written last is read next."""
        self._buffers = {name: (new, old) for name, (old, new) in self._buffers.items()}

    def sibling(self) -> TensorRTSession:
        """A session over the same engine, with contexts and a cache of its own."""
        return TensorRTSession(self._folder, name=self.name, engine=self._opened)

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        """As every session's; ResourceError says that TensorRT could not run the call."""
        rows, count = self._check_call(input_ids)
        if self._rows is None:
            self._start_cache(rows)
        pieces: list[np.ndarray] = []
        for start, stop in split_call(count, self.manifest["limits"]["max_prefill"]):
            block = input_ids[:, start:stop]
            if self._step and stop - start == 1:
                logits = self._step.run(block, self._length)
            else:
                logits = self._run(block, last_only)
            pieces = [logits] if last_only else [*pieces, logits]
            self._length += stop - start
        self._rows = rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)

    def _check_rows(self, rows: int) -> None:
        """Raise InputError for more rows than the engine was built for, too."""
        super()._check_rows(rows)
        require_rows(rows, self.manifest["limits"]["max_batch"], self.name)

    def _start_cache(self, rows: int) -> None:
        """Zeroed buffers for `rows` sequences: a stale NaN would survive a mask of zero weight.

        Those of as many rows stay where they are, as the graph of the step wants.
        """
        if self._made_for == rows:
            for buffer in itertools.chain(*self._buffers.values()):
                buffer.zero_()
            self._torch.cuda.synchronize()
            return
        names = [name for name in self._profiles[0].shapes if name.startswith(CACHE_PREFIX)]
        self._buffers = {name: self._make_buffers(name, rows) for name in names}
        self._step = self._make_step(rows) if self._in_place else None
        self._torch.cuda.synchronize()
        self._made_for = rows

    def _make_step(self, rows: int) -> EngineStep:
        """The step of one token, its context told of everything that it will ever need."""
        on_host = {name for name in TOKEN_INPUTS if self._device(name) == "cpu"}
        step = EngineStep(
            self._torch, self._stream, rows, self.max_length, self.vocab_size,
            self._dtype(LOGITS), frozenset(on_host), lambda: self._execute(0),
        )  # fmt: skip
        shapes = step.shapes | {name: self._cache_shape(name, rows) for name in self._buffers}
        self._bind(0, shapes, {**step.addresses, LOGITS: step.logits.data_ptr()})
        return step

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

    def _run(self, input_ids: np.ndarray, last_only: bool) -> np.ndarray:
        """One call of the engine: float32 logits [B, S, V] or [B, 1, V]; the cache moves on."""
        rows, count = input_ids.shape
        feeds = {
            name: self._torch.from_numpy(values).to(self._device(name))
            for name, values in self._feeds(input_ids).items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in feeds.items()}
        shapes |= {name: self._cache_shape(name, rows) for name in self._buffers}
        logits = self._torch.empty(
            (rows, count, self.vocab_size), dtype=self._dtype(LOGITS), device="cuda"
        )
        addresses = {name: tensor.data_ptr() for name, tensor in feeds.items()}
        index = self._profile_for(shapes)
        self._bind(index, shapes, addresses | {LOGITS: logits.data_ptr()})
        # The copies above ran on torch's current stream.
        self._stream.wait_stream(self._torch.cuda.current_stream())
        self._execute(index)
        self._stream.synchronize()
        if not self._in_place:
            self._swap()
        wanted = logits[:, -1:] if last_only else logits
        answer: np.ndarray = wanted.float().cpu().numpy()
        return answer

    def _profile_for(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Index of the profile of a call; the first is left to the step, where there is one."""
        index = pick_profile(self._profiles, shapes)
        alone = self._step is not None and len(self._profiles) > 1
        return max(1, index) if alone else index

    def _execute(self, index: int) -> None:
        """Give a context's call to the stream; raise ResourceError when TensorRT cannot."""
        if not self._contexts[index].execute_async_v3(self._stream.cuda_stream):
            raise ResourceError("TensorRT could not run the engine.", where=self.name)

    def _feeds(self, input_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The inputs of a call; a mask over a fixed cache has one shape, whatever is in it.

        TensorRT for RTX compiles kernels for every shape that it has not seen.
        """
        feeds = dict(token_feeds(input_ids, self._length))
        if self._in_place and ATTENTION_MASK in feeds:
            spare = self.max_length - feeds[ATTENTION_MASK].shape[1]
            feeds[ATTENTION_MASK] = np.pad(feeds[ATTENTION_MASK], ((0, 0), (0, spare)))
        return feeds

    def _cache_shape(self, name: str, rows: int) -> tuple[int, ...]:
        """Shape of a cache input for this call."""
        _, heads, _, width = self._profiles[0].shapes[name].max
        return (rows, heads, self.max_length if self._in_place else self._length, width)

    def _bind(
        self, index: int, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
    ) -> None:
        """Give a context every shape and address of a call."""
        context = self._contexts[index]
        caches = {name: past.data_ptr() for name, (past, _) in self._buffers.items()}
        caches |= {present_name(name): new.data_ptr() for name, (_, new) in self._buffers.items()}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise InputError(
                    f"The engine refuses the shape of '{name}'.", where=self.name, observed=shape
                )
        for name, address in {**addresses, **caches}.items():
            if not context.set_tensor_address(name, address):
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
