"""Standard TensorRT, 10.3 to 11.x: builds on the GPU that will run the engine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from pipeline.engine.graph_variants import needs_stripping, write_split_graph, write_stripped_graph
from pipeline.engine.network import build_network, load_library
from pipeline.engine.plugin_library import load_plugin
from pipeline.engine.worker_protocol import WorkerRequest, WorkerResult
from pipeline.errors import InputError
from pipeline.export.contract import COMPAT, PROFILES, dotted


def build(request: WorkerRequest, staging: Path) -> WorkerResult:
    """Build the engine of `request` on this machine's GPU and write its plan into `staging`.

    Raises:
        InputError: TensorRT is too old for the export, or the plugin or graph is refused.
        MissingPackageError: tensorrt is not installed.
        ResourceError: memory ran out.
    """
    library = load_library("tensorrt", "build an engine with standard TensorRT")
    version = _parse_version(library.__version__)
    _require_version(version, request.onnx_profile)
    if request.plugin is not None:
        load_plugin(library, request.plugin)
    if request.embed:
        _register_kernels(request)
    onnx_path, notes = _graph_to_parse(request, staging, version)
    result = build_network(library, request, staging, onnx_path)
    if onnx_path != request.onnx_path:
        shutil.rmtree(onnx_path.parent)
    return replace(result, notes=notes)


def _register_kernels(request: WorkerRequest) -> None:
    """Offer the block-skip kernels to this TensorRT; raise InputError when it cannot embed them."""
    from trt_plugins.block_skip.aot import register

    major, minor = request.compute_capability
    register(10 * major + minor)


def _parse_version(text: str) -> tuple[int, ...]:
    """'10.3.0' or '11.4.0.106' -> (10, 3, 0) or (11, 4, 0, 106); a suffix ends it."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _require_version(version: tuple[int, ...], onnx_profile: str) -> None:
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


def _graph_to_parse(
    request: WorkerRequest, staging: Path, version: tuple[int, ...]
) -> tuple[Path, tuple[str, ...]]:
    """The graph this TensorRT must be given, and what to note about it."""
    if request.embed:
        split = write_split_graph(request.onnx_path, staging / "split")
        return split, ("block-skip kernels are part of the engine: it needs no plugin library",)
    if not needs_stripping(version, request.plugin is not None):
        return request.onnx_path, ()
    stripped = write_stripped_graph(request.onnx_path, staging / "stripped")
    return stripped, (
        "block-skip function bodies were removed from the graph given to TensorRT, which would "
        "have preferred them to the plugin",
    )
