"""The exported graph as a TensorRT needs it: with kernels of ours in it, or without their bodies.

For kernels inside the engine each block-skip node is split into the two that TensorRT embeds, which
`trt_plugins.block_skip.aot` offers to it:

    BlockSkipLinear(x, a, b)               ->  BlockSkipProduct(BlockSkipMix(x, a), b)
    BlockSkipLinearIndexed(x, a, b, index) ->  BlockSkipProduct(BlockSkipMixIndexed(x, a, index), b)

Up to TensorRT 10.6 a local function always wins over a plugin of the same name, so there the plugin
is only taken from a file that has no such function.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.export.contract import BLOCK_SKIP_OPS, DOMAIN, OP_VERSION
from pipeline.export.onnx_folder import data_files, load_graph
from trt_plugins.block_skip.aot import MIX, MIX_INDEXED, PRODUCT

if TYPE_CHECKING:
    import onnx

_FIRST_PLUGIN_OVER_FUNCTION = (10, 7)


def needs_stripping(version: tuple[int, ...], plugin_registered: bool) -> bool:
    """Whether this TensorRT would take the function although the plugin is there."""
    return plugin_registered and version[:2] < _FIRST_PLUGIN_OVER_FUNCTION


def write_stripped_graph(onnx_path: Path, folder: Path) -> Path:
    """Write `onnx_path` without block-skip bodies into a new `folder`; arguments as below."""
    return _write_variant(load_graph(onnx_path), onnx_path, folder)


def write_split_graph(onnx_path: Path, folder: Path) -> Path:
    """Write `onnx_path` with every block-skip node split into a new `folder`, with its weights.

    Args:
        onnx_path: absolute path of a graph with external weights beside it.
        folder: is made; holds the graph and symbolic links to its weights, which TensorRT
            follows (the onnx package would not, nor would it read a hard link).

    Returns:
        Path of the new graph.
    """
    model = load_graph(onnx_path)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        ours = node.domain == DOMAIN and node.op_type in BLOCK_SKIP_OPS
        nodes += _split_node(node) if ours else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return _write_variant(model, onnx_path, folder)


def _split_node(node: onnx.NodeProto) -> list[onnx.NodeProto]:
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


def _write_variant(model: onnx.ModelProto, onnx_path: Path, folder: Path) -> Path:
    """Write a changed graph without the bodies that a plugin takes the place of.

    Bodies of nodes with quantised factors stay: nothing else computes those.
    """
    kept = [
        function
        for function in model.functions
        if not (function.domain == DOMAIN and function.name in BLOCK_SKIP_OPS)
    ]
    del model.functions[:]
    model.functions.extend(kept)
    folder.mkdir(parents=True)
    written = folder / onnx_path.name
    written.write_bytes(model.SerializeToString())
    for weights in data_files(model, onnx_path.parent):
        (folder / weights.name).symlink_to(weights)
    return written
