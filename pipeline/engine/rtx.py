"""TensorRT for RTX: builds ahead of time for a named GPU generation, with or without a GPU."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.engine.layers import (
    block_skip_path,
    count_layer_types,
    few_bits_path,
    read_engine_layers,
)
from pipeline.engine.network import make_config, parse_network, write_plan
from pipeline.engine.target import Capability, Gpu, capability_name, find_gpu
from pipeline.engine.worker_protocol import PLAN_FILE, BuildRequest, BuildResult
from pipeline.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    import tensorrt as trt


def build(request: BuildRequest) -> BuildResult:
    """Build the engine of `request` and write its plan.

    Raises:
        InputError: a plugin was asked for, or the graph or capability is refused.
        MissingPackageError: tensorrt_rtx is not installed.
        ResourceError: memory ran out.
    """
    if request.plugin is not None:
        raise plugin_refused()
    library = load_library()
    started = time.monotonic()
    parsed = parse_network(library, request.onnx_path)
    parse_seconds = time.monotonic() - started
    layer_types = count_layer_types(parsed.network)
    path = block_skip_path(layer_types, request.block_skip_nodes, plugin_wanted=False)
    few_bits = few_bits_path(layer_types, request.dequantized, request.few_bit_nodes)
    config = make_config(library, parsed, request)
    set_capability(library, config, request.compute_capability)
    started = time.monotonic()
    plan_path = request.staging / PLAN_FILE
    write_plan(parsed, config, plan_path)
    build_seconds = time.monotonic() - started
    return BuildResult(
        library_version=library.__version__,
        block_skip=asdict(path),
        layer_types=layer_types,
        engine_layers=engine_layers(library, request, find_gpu()),
        parse_seconds=parse_seconds,
        build_seconds=build_seconds,
        peak_memory_bytes=0,
        notes=(),
        few_bits=few_bits,
    )


def load_library() -> Any:
    """The module `tensorrt_rtx`; raise MissingPackageError when it is not installed."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise MissingPackageError(
            "tensorrt-rtx-cu13", "rtx", "build an engine for an RTX GPU"
        ) from error
    return tensorrt_rtx


def set_capability(library: Any, config: trt.IBuilderConfig, capability: Capability) -> None:
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


def engine_layers(library: Any, request: BuildRequest, gpu: Gpu | None) -> dict[str, Any]:
    """Layers of the built engine where its GPU is present, else why they cannot be read."""
    if gpu is None or gpu.capability != request.compute_capability:
        here = "no NVIDIA GPU" if gpu is None else gpu.name
        return {
            "readable": False,
            "why": f"this machine has {here}; deserialising the plan to inspect it needs the GPU "
            "it is for",
        }
    return read_engine_layers(library, request.staging / PLAN_FILE)


def plugin_refused() -> InputError:
    """The error for --plugin or --embed-kernels with an RTX target."""
    return InputError(
        "TensorRT for RTX takes no plugins on Linux: parsing a node that resolves to one aborts "
        "the process.",
        change="leave --plugin and --embed-kernels out (function bodies are inlined into native "
        "layers), or use --target tensorrt",
    )
