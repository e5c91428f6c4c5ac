"""What TensorRT made of the graph, read back: no flag is trusted, the layers are counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.engine.network import make_logger
from pipeline.errors import InputError
from pipeline.export.contract import BLOCK_SKIP, DOMAIN, OP_VERSION

if TYPE_CHECKING:
    import tensorrt as trt

PLUGIN_LAYER = "PLUGIN_V3"
DEQUANTIZE_LAYER = "DEQUANTIZE"


@dataclass(frozen=True)
class BlockSkipPath:
    """How the block-skip nodes of a graph were taken.

    Attributes:
        path: `plugin`, `embedded kernels` (see `embed`), `function body` (inlined into native
            layers), or `none` without such nodes.
        nodes: how many there are.
    """

    path: Literal["plugin", "embedded kernels", "function body", "none"]
    nodes: int


def count_layer_types(network: trt.INetworkDefinition) -> dict[str, int]:
    """Layers of a parsed network by type, the most frequent first."""
    types = (network.get_layer(index).type.name for index in range(network.num_layers))
    return dict(Counter(types).most_common())


def block_skip_path(
    layer_types: Mapping[str, int], nodes: int, plugin_wanted: bool
) -> BlockSkipPath:
    """Which path the block-skip nodes took.

    A plugin whose namespace or version does not match is passed over without a word, so the
    number of plugin layers has to be the number of nodes, or zero.

    Args:
        layer_types: layers of the parsed network by type.
        nodes: block-skip nodes in the ONNX graph.
        plugin_wanted: whether the user gave a plugin library.

    Raises:
        InputError: some nodes took the plugin and some not, or none took the plugin that was given.
    """
    plugin_layers = layer_types.get(PLUGIN_LAYER, 0)
    if plugin_layers not in (0, nodes):
        raise InputError(
            "Only part of the block-skip nodes took the plugin.",
            observed=f"{plugin_layers} plugin layers",
            expected=f"0 or {nodes}",
            change="export again, so that all nodes name the same plugin version and namespace",
        )
    if plugin_wanted and plugin_layers == 0:
        raise InputError(
            "The plugin was loaded, and no node of the graph took it.",
            observed=f"0 plugin layers for {nodes} block-skip nodes",
            expected="as many plugin layers as nodes, and at least one",
            change="check the plugin's name, version and namespace "
            f"({BLOCK_SKIP}, {OP_VERSION}, {DOMAIN}), "
            "or build without --plugin",
        )
    if nodes == 0:
        return BlockSkipPath("none", 0)
    return BlockSkipPath("plugin" if plugin_layers else "function body", nodes)


def few_bits_path(layer_types: Mapping[str, int], matrices: int, nodes: int) -> dict[str, Any]:
    """How the matrices in few bits were taken, for the manifest.

    Args:
        layer_types: layers of the parsed network by type.
        matrices: DequantizeLinear nodes in the ONNX graph.
        nodes: block-skip nodes with a factor in few bits.

    Raises:
        InputError: some matrices are codes no longer after parsing: the plan would hold numbers.
    """
    layers = layer_types.get(DEQUANTIZE_LAYER, 0)
    if layers < matrices:
        raise InputError(
            "TensorRT wrote codes of few bits out as numbers while parsing.",
            observed=f"{layers} layers of the kind {DEQUANTIZE_LAYER}",
            expected=f"{matrices}, one for each matrix in few bits",
            change="export with --weights float, or use the TensorRT that this was tested with",
        )
    path = "function body" if nodes else "none"
    return {"matrices": matrices, "block_skip_nodes": nodes, "path": path}


def read_engine_layers(library: Any, plan_path: Path) -> dict[str, Any]:
    """Layers of a built engine, through the engine inspector.

    Deserialising needs a CUDA driver and the GPU the plan is for, so this works where the engine
    can run: TensorRT for RTX 1.7 without a driver stops at cudaError 35, for the engine and for
    `get_engine_validity` alike.

    Returns:
        `{"readable": True, "types": {...}, "device_memory_bytes": n}`, or
        `{"readable": False, "why": ...}`.
    """
    errors: list[str] = []
    runtime = library.Runtime(make_logger(library, errors))
    if hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan_path.read_bytes())
    if engine is None:
        return {"readable": False, "why": errors[0] if errors else "no reason given"}
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return {
        "readable": True,
        "types": inspected_types(text),
        "device_memory_bytes": int(engine.device_memory_size_v2),
    }


def inspected_types(text: str) -> dict[str, int]:
    """Layers by type out of the inspector's JSON; 'unnamed' for those it gives only as a name."""
    layers = json.loads(text).get("Layers", [])
    types = (
        str(layer.get("LayerType", "unnamed")) if isinstance(layer, dict) else "unnamed"
        for layer in layers
    )
    return dict(Counter(types).most_common())
