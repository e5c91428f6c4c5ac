"""The graph without its block-skip function bodies, for TensorRT up to 10.6.

There a local function always wins over a plugin of the same name, so the plugin is only taken
from a file that has no such function.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.engine.onnx_folder import (
    BLOCK_SKIP_DOMAIN,
    BLOCK_SKIP_OPS,
    data_files,
    load_graph,
)

if TYPE_CHECKING:
    import onnx

FIRST_PLUGIN_OVER_FUNCTION = (10, 7)


def needs_stripping(version: tuple[int, ...], plugin_registered: bool) -> bool:
    """Whether this TensorRT would take the function although the plugin is there."""
    return plugin_registered and version[:2] < FIRST_PLUGIN_OVER_FUNCTION


def write_stripped_graph(onnx_path: Path, folder: Path) -> Path:
    """Write `onnx_path` without block-skip bodies into a new `folder`, with its weights.

    Args:
        onnx_path: absolute path of a graph with external weights beside it.
        folder: is made; holds the graph and symbolic links to its weights, which TensorRT
            follows (the onnx package would not, nor would it read a hard link).

    Returns:
        Path of the stripped graph.
    """
    model = load_graph(onnx_path)
    kept = without_block_skip_bodies(model)
    del model.functions[:]
    model.functions.extend(kept)
    folder.mkdir(parents=True)
    stripped = folder / onnx_path.name
    stripped.write_bytes(model.SerializeToString())
    for weights in data_files(model, onnx_path.parent):
        (folder / weights.name).symlink_to(weights)
    return stripped


def without_block_skip_bodies(model: onnx.ModelProto) -> list[onnx.FunctionProto]:
    """The functions of a graph, but for those that a plugin takes the place of.

    Bodies of nodes with factors in few bits stay: nothing else computes those.
    """
    return [
        function
        for function in model.functions
        if not (function.domain == BLOCK_SKIP_DOMAIN and function.name in BLOCK_SKIP_OPS)
    ]
