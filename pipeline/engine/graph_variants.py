"""The graph for kernels inside the engine: each block-skip node as the two that TensorRT embeds.

BlockSkipLinear(x, a, b)               ->  BlockSkipProduct(BlockSkipMix(x, a), b)
BlockSkipLinearIndexed(x, a, b, index) ->  BlockSkipProduct(BlockSkipMixIndexed(x, a, index), b)

`trt_plugins.block_skip.aot` offers those two to TensorRT.

The graph without its block-skip function bodies, for TensorRT up to 10.6.

There a local function always wins over a plugin of the same name, so the plugin is only taken
from a file that has no such function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.layers import PLUGIN_LAYER, BlockSkipPath
from pipeline.errors import InputError
from pipeline.export.contract import BLOCK_SKIP_OPS, DOMAIN, OP_VERSION
from pipeline.export.onnx_folder import data_files, load_graph
from trt_plugins.block_skip.aot import MIX, MIX_INDEXED, PRODUCT

if TYPE_CHECKING:
    import onnx

LAYERS_PER_NODE = 2


def split_node(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """One block-skip node as its two products, which ask for embedded kernels."""
    from onnx import helper

    x, a, b, *index = node.input
    latent = f"{node.output[0]}/latent"
    # `aot`: embedded or refused, whatever the network's flags prefer.
    attributes: dict[str, Any] = {
        "plugin_namespace": DOMAIN,
        "plugin_version": str(OP_VERSION),
        "aot": 1,
    }
    name = node.name or node.output[0]
    mix = helper.make_node(
        MIX_INDEXED if index else MIX, [x, a, *index], [latent], name=f"{name}/mix",
        domain=DOMAIN, **attributes,
    )  # fmt: skip
    product = helper.make_node(
        PRODUCT, [latent, b], list(node.output), name=f"{name}/product",
        domain=DOMAIN, **attributes,
    )  # fmt: skip
    return [mix, product]


def write_split_graph(onnx_path: Path, folder: Path) -> Path:
    """Write `onnx_path` with every block-skip node split into a new `folder`, with its weights.

    Args:
        onnx_path: absolute path of a graph with external weights beside it.
        folder: is made; holds the graph and symbolic links to its weights.

    Returns:
        Path of the split graph.
    """
    model = load_graph(onnx_path)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        ours = node.domain == DOMAIN and node.op_type in BLOCK_SKIP_OPS
        nodes += split_node(node) if ours else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = without_block_skip_bodies(model)
    del model.functions[:]
    model.functions.extend(kept)
    folder.mkdir(parents=True)
    split = folder / onnx_path.name
    split.write_bytes(model.SerializeToString())
    for weights in data_files(model, onnx_path.parent):
        (folder / weights.name).symlink_to(weights)
    return split


def embedded_path(layer_types: Mapping[str, int], nodes: int) -> BlockSkipPath:
    """Check after parsing that every product became a plugin layer.

    Args:
        layer_types: layers of the parsed network by type.
        nodes: block-skip nodes in the ONNX graph.

    Raises:
        InputError: some did not.
    """
    found = layer_types.get(PLUGIN_LAYER, 0)
    if found != LAYERS_PER_NODE * nodes:
        raise InputError(
            "Not every block-skip node became embedded kernels.",
            observed=f"{found} plugin layers",
            expected=f"{LAYERS_PER_NODE * nodes}, two for each of {nodes} nodes",
            change="build with the plugin library instead: make plugin",
        )
    return BlockSkipPath("embedded kernels" if nodes else "none", nodes)


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
        if not (function.domain == DOMAIN and function.name in BLOCK_SKIP_OPS)
    ]
