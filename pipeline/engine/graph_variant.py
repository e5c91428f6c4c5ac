"""Graphs that are written for one build alone, beside links to the weights of the exported one."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.engine.dequantized import dequantize_nodes
from pipeline.engine.growing_cache import let_cache_grow
from pipeline.engine.worker_protocol import WorkerRequest
from pipeline.export.contract import CACHE_WRITE, DEQUANTIZE, DOMAIN
from pipeline.export.onnx_folder import data_files, load_graph

if TYPE_CHECKING:
    import onnx


def without_plugin(
    request: WorkerRequest, staging: Path
) -> tuple[WorkerRequest, Path, tuple[str, ...]]:
    """The graph for a TensorRT without our plugin, what it holds, and what to note.

    Args:
        request: its graph is not changed.
        staging: where another is written, if there are nodes of codes, or nodes that write a
            cache, of which TensorRT's own layers make one that grows.
    """
    if not request.coded_nodes and not request.cache_nodes:
        return request, request.onnx_path, ()
    model, notes = load_graph(request.onnx_path), []
    if request.coded_nodes:
        request, note = _dequantized(model, request)
        notes.append(note)
    if request.cache_nodes:
        let_cache_grow(model)
        notes.append(
            "the cache grows, and is copied with every token: only the plugin library writes it in "
            f"place ({CACHE_WRITE})"
        )
    written = write_variant(model, request.onnx_path, staging / "without-plugin")
    return replace(request, cache_nodes=0), written, tuple(notes)


def _dequantized(model: onnx.ModelProto, request: WorkerRequest) -> tuple[WorkerRequest, str]:
    """Change a graph's nodes of codes; what it then holds, and what to note."""
    made = dequantize_nodes(model, request.onnx_path.parent)
    holds = replace(
        request,
        dequantized=request.dequantized + made.matrices,
        quantized_nodes=request.quantized_nodes + made.skips,
        coded_nodes=0,
        coded_matrices=0,
    )
    note = (
        f"{made.matrices} matrices of codes go through {DEQUANTIZE} and TensorRT's own products: "
        "only the plugin library multiplies with them as they are"
    )
    return holds, note


def write_variant(
    model: onnx.ModelProto, onnx_path: Path, folder: Path, replaced: Collection[str] = ()
) -> Path:
    """Write a changed graph into a new folder, with its weights.

    Args:
        model: changed: it loses the bodies that are replaced.
        onnx_path: absolute path of the graph it was, external weights beside it.
        folder: is made; holds the graph and links to its weights, which TensorRT follows (the
            onnx package would not).
        replaced: ops of ours that kernels take the place of; bodies of others stay, for nothing
            else computes those.

    Returns:
        Path of the new graph.
    """
    kept = [
        function
        for function in model.functions
        if not (function.domain == DOMAIN and function.name in replaced)
    ]
    del model.functions[:]
    model.functions.extend(kept)
    folder.mkdir(parents=True)
    written = folder / onnx_path.name
    written.write_bytes(model.SerializeToString())
    for weights in data_files(model, onnx_path.parent):
        _link(weights.resolve(), folder / weights.name)
    return written


def _link(file: Path, link: Path) -> None:
    """Make a file be found at another place as well: on Windows few may make symbolic links."""
    try:
        link.symlink_to(file)
    except (OSError, NotImplementedError):
        try:
            link.hardlink_to(file)
        except OSError:  # another disk
            shutil.copyfile(file, link)


def remove_variant(request: WorkerRequest, onnx_path: Path) -> None:
    """Remove the folder of a graph that is not the request's own."""
    if onnx_path != request.onnx_path:
        shutil.rmtree(onnx_path.parent)
