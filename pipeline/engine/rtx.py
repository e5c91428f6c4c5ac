"""TensorRT for RTX: builds ahead of time for a named GPU generation, with or without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.graph_variant import remove_variant, without_plugin
from pipeline.engine.network import build_network
from pipeline.engine.target import load_library
from pipeline.engine.worker_protocol import WorkerRequest, WorkerResult
from pipeline.errors import InputError
from pipeline.gpu import Capability, Gpu, capability_name, find_gpu

if TYPE_CHECKING:
    import tensorrt as trt


def build(request: WorkerRequest, staging: Path) -> WorkerResult:
    """Build the engine of `request` and write its plan into `staging`.

    Raises:
        InputError: the graph or capability is refused.
        MissingPackageError: tensorrt_rtx is not installed.
        ResourceError: memory ran out.
    """
    library = load_library("rtx", "build an engine for an RTX GPU")
    request, onnx_path, notes = without_plugin(request, staging)
    result = build_network(
        library,
        request,
        staging,
        onnx_path,
        configure=lambda config: _set_capability(library, config, request.compute_capability),
        unreadable=_why_unreadable(request.compute_capability, find_gpu()),
    )
    remove_variant(request, onnx_path)
    return replace(result, notes=(*result.notes, *notes))


def _set_capability(library: Any, config: trt.IBuilderConfig, capability: Capability) -> None:
    """Build for one GPU generation only, which keeps the plan small.

    Raises:
        InputError: this version of TensorRT for RTX does not know the capability.
    """
    known = library.ComputeCapability.__members__
    name = capability_name(capability).upper()
    if name not in known:
        raise InputError(
            f"TensorRT for RTX {library.__version__} does not build for {name}.",
            expected=", ".join(key for key in known if key.startswith("SM")),
            change="name another --target, or update tensorrt-rtx-cu13",
        )
    config.num_compute_capabilities = 1  # type: ignore[attr-defined]
    config.set_compute_capability(known[name], 0)  # type: ignore[attr-defined]


def _why_unreadable(capability: Capability, gpu: Gpu | None) -> str:
    """Why an engine for `capability` cannot be read back here; empty where its GPU is present."""
    if gpu is not None and gpu.capability == capability:
        return ""
    here = "no NVIDIA GPU" if gpu is None else gpu.name
    return f"this machine has {here}; deserialising the plan to inspect it needs the GPU it is for"
