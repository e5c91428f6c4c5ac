"""Standard TensorRT, 10.3 to 11.x: builds on the GPU that will run the engine."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.engine.graph_variants import (
    embedded_path,
    needs_stripping,
    write_split_graph,
    write_stripped_graph,
)
from pipeline.engine.layers import (
    block_skip_path,
    count_layer_types,
    few_bits_path,
    read_engine_layers,
)
from pipeline.engine.network import make_config, parse_network, write_plan
from pipeline.engine.plugin_library import load_plugin
from pipeline.engine.worker_protocol import PLAN_FILE, BuildRequest, BuildResult
from pipeline.errors import InputError, MissingPackageError
from pipeline.export.contract import COMPAT, PROFILES, dotted


def build(request: BuildRequest) -> BuildResult:
    """Build the engine of `request` on this machine's GPU and write its plan.

    Raises:
        InputError: TensorRT is too old for the export, or the plugin or graph is refused.
        MissingPackageError: tensorrt is not installed.
        ResourceError: memory ran out.
    """
    library = load_library()
    version = parse_version(library.__version__)
    require_version(version, request.onnx_profile)
    if request.plugin is not None:
        load_plugin(library, request.plugin)
    if request.embed:
        register_kernels(request)
    onnx_path, notes = graph_to_parse(request, version)
    started = time.monotonic()
    parsed = parse_network(library, onnx_path)
    parse_seconds = time.monotonic() - started
    layer_types = count_layer_types(parsed.network)
    if request.embed:
        path = embedded_path(layer_types, request.block_skip_nodes)
    else:
        path = block_skip_path(layer_types, request.block_skip_nodes, request.plugin is not None)
    few_bits = few_bits_path(layer_types, request.dequantized, request.few_bit_nodes)
    config = make_config(library, parsed, request)
    started = time.monotonic()
    plan_path = request.staging / PLAN_FILE
    write_plan(parsed, config, plan_path)
    build_seconds = time.monotonic() - started
    if onnx_path != request.onnx_path:
        shutil.rmtree(onnx_path.parent)
    return BuildResult(
        library_version=library.__version__,
        block_skip=asdict(path),
        layer_types=layer_types,
        engine_layers=read_engine_layers(library, plan_path),
        parse_seconds=parse_seconds,
        build_seconds=build_seconds,
        peak_memory_bytes=0,
        notes=notes,
        few_bits=few_bits,
    )


def load_library() -> Any:
    """The module `tensorrt`; raise MissingPackageError when it cannot be imported."""
    try:
        import tensorrt
    except ImportError as error:
        raise MissingPackageError(
            "tensorrt", "trt", "build an engine with standard TensorRT"
        ) from error
    return tensorrt


def register_kernels(request: BuildRequest) -> None:
    """Offer the block-skip kernels to this TensorRT; raise InputError when it cannot embed them."""
    from trt_plugins.block_skip.aot import register

    major, minor = request.compute_capability
    register(10 * major + minor)


def parse_version(text: str) -> tuple[int, ...]:
    """'10.3.0' or '11.4.0.106' -> (10, 3, 0) or (11, 4, 0, 106); a suffix ends it."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def require_version(version: tuple[int, ...], onnx_profile: str) -> None:
    """Raise InputError when this TensorRT lacks the operators of the export's profile."""
    oldest = PROFILES[onnx_profile].oldest_tensorrt
    assert oldest is not None, "an export that TensorRT does not know is refused before"
    if version[:2] < oldest:
        raise InputError(
            f"This TensorRT is too old for the export profile '{onnx_profile}'.",
            observed=f"TensorRT {dotted(version)}",
            expected=f"TensorRT {dotted(oldest)} or newer",
            change=f"export the checkpoint again with --profile {COMPAT}"
            if onnx_profile != COMPAT
            else f"update TensorRT (JetPack 6.1 or newer brings {dotted(oldest)})",
        )


def graph_to_parse(request: BuildRequest, version: tuple[int, ...]) -> tuple[Path, tuple[str, ...]]:
    """The graph this TensorRT must be given, and what to note about it."""
    if request.embed:
        split = write_split_graph(request.onnx_path, request.staging / "split")
        return split, ("block-skip kernels are part of the engine: it needs no plugin library",)
    if not needs_stripping(version, request.plugin is not None):
        return request.onnx_path, ()
    stripped = write_stripped_graph(request.onnx_path, request.staging / "stripped")
    return stripped, (
        "block-skip function bodies were removed from the graph given to TensorRT, which would "
        "have preferred them to the plugin",
    )
