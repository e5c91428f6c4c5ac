"""Which path the nodes of our ops took in TensorRT: a plugin, kernels in the engine, or their body.

TensorRT says nothing where it falls back, so the layers of the parsed network are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.engine.worker_protocol import WorkerRequest
from pipeline.errors import InputError
from pipeline.export.contract import BLOCK_SKIP, COMPAT, DOMAIN, OP_VERSION

_PLUGIN_LAYER = "PLUGIN_V3"
_DEQUANTIZE_LAYER = "DEQUANTIZE"
_EMBEDDED_LAYERS_OF_A_NODE = 2


@dataclass(frozen=True)
class _BlockSkipPath:
    """How the block-skip nodes of a graph were taken.

    Attributes:
        path: `plugin`, `embedded kernels` (see `standard`), `function body` (inlined into
            native layers), or `none` without such nodes.
        nodes: how many there are.
    """

    path: Literal["plugin", "embedded kernels", "function body", "none"]
    nodes: int


def paths_taken(request: WorkerRequest, layer_types: Mapping[str, int]) -> dict[str, Any]:
    """What a `WorkerResult` says of the paths of all nodes of our ops.

    Args:
        request: which paths were asked for, and how many nodes of each kind there are.
        layer_types: layers of the parsed network by type.

    Raises:
        InputError: nodes took another path than the one asked for, or only some of them did.
    """
    layer_types, written = _without_writes(request, layer_types)
    nodes = request.block_skip_nodes + request.coded_nodes
    others = nodes * (_EMBEDDED_LAYERS_OF_A_NODE if request.embed else 1)
    return {
        "block_skip": asdict(_block_skip_path_of(request, layer_types, nodes)),
        "few_bits": _quantized_path(
            layer_types, request.dequantized, request.quantized_nodes, request.coded_matrices
        ),
        "latent_attention": _latent_path(layer_types, request.latent_nodes, others),
        "cache_write": written,
    }


def _without_writes(
    request: WorkerRequest, layer_types: Mapping[str, int]
) -> tuple[Mapping[str, int], dict[str, Any]]:
    """Layers of other nodes than those that write the cache, and how those were taken.

    Raises:
        InputError: the plugin took none of them; the rest shows in what is left.
    """
    if not request.writes_in_place:
        return layer_types, {}
    count, left = request.cache_nodes, dict(layer_types)
    found = left.get(_PLUGIN_LAYER, 0)
    if found < count:
        raise InputError(
            "Nodes that write the cache did not take the plugin.",
            observed=f"{found} plugin layers",
            expected=f"at least {count}, one for each",
            change=f"build the plugin again (make plugin), or export with --profile {COMPAT}",
        )
    left[_PLUGIN_LAYER] = found - count
    return left, {"nodes": count, "path": "plugin"}


def _block_skip_path_of(
    request: WorkerRequest, layer_types: Mapping[str, int], nodes: int
) -> _BlockSkipPath:
    """Which path the nodes took, those of codes too; raise InputError if another was asked for."""
    if request.embed:
        return _embedded_path(layer_types, nodes)
    # A library that is there to write the cache need not have anything else to do.
    wanted = request.plugin is not None and (nodes > 0 or not request.cache_nodes)
    return _block_skip_path(layer_types, nodes, wanted, request.latent_nodes)


def _latent_path(layer_types: Mapping[str, int], nodes: int, others: int) -> dict[str, Any]:
    """How attention to latents was taken, for the manifest.

    Args:
        layer_types: layers of the parsed network by type, which `_block_skip_path` looked at.
        nodes: attention to latents that a plugin may take.
        others: plugin layers that block skip may have.
    """
    taken = nodes > 0 and layer_types.get(_PLUGIN_LAYER, 0) == others + nodes
    body = "function body" if nodes else "none"
    return {"nodes": nodes, "path": "plugin" if taken else body}


def _block_skip_path(
    layer_types: Mapping[str, int], nodes: int, plugin_wanted: bool, latent_nodes: int = 0
) -> _BlockSkipPath:
    """Which path the block-skip nodes took.

    A plugin whose namespace or version does not match is passed over without a word, so the
    number of plugin layers has to be the number of nodes, or zero; with those of attention to
    latents, where the library has a plugin for them.

    Args:
        layer_types: layers of the parsed network by type.
        nodes: block-skip nodes in the ONNX graph.
        plugin_wanted: whether the user gave a plugin library.
        latent_nodes: attention to latents that a plugin may take.

    Raises:
        InputError: some nodes took the plugin and some not, or none took the plugin that was given.
    """
    plugin_layers = layer_types.get(_PLUGIN_LAYER, 0)
    if plugin_layers not in (0, nodes, nodes + latent_nodes):
        raise InputError(
            "Only part of the block-skip nodes took the plugin.",
            observed=f"{plugin_layers} plugin layers",
            expected=f"0 or {nodes}" + (f", or {nodes + latent_nodes}" if latent_nodes else ""),
            change="export again, so that all nodes name the same plugin version and namespace",
        )
    if plugin_wanted and plugin_layers == 0:
        raise InputError(
            "The plugin was loaded, and no node of the graph took it.",
            observed=f"0 plugin layers for {nodes} block-skip nodes",
            expected="as many plugin layers as nodes, and at least one",
            change="check the plugin's name, version and namespace "
            f"({BLOCK_SKIP}, {OP_VERSION}, {DOMAIN}), or build without --plugin",
        )
    if nodes == 0:
        return _BlockSkipPath("none", 0)
    return _BlockSkipPath("plugin" if plugin_layers else "function body", nodes)


def _embedded_path(layer_types: Mapping[str, int], nodes: int) -> _BlockSkipPath:
    """The path of nodes that were split for embedded kernels: every product a plugin layer.

    Args:
        layer_types: layers of the parsed network by type.
        nodes: block-skip nodes in the ONNX graph.

    Raises:
        InputError: some products are not.
    """
    found, expected = layer_types.get(_PLUGIN_LAYER, 0), _EMBEDDED_LAYERS_OF_A_NODE * nodes
    if found != expected:
        raise InputError(
            "Not every block-skip node became embedded kernels.",
            observed=f"{found} plugin layers",
            expected=f"{expected}, two for each of {nodes} nodes",
            change="build with the plugin library instead: make plugin",
        )
    return _BlockSkipPath("embedded kernels" if nodes else "none", nodes)


def _quantized_path(
    layer_types: Mapping[str, int], matrices: int, nodes: int, coded: int = 0
) -> dict[str, Any]:
    """How the quantised matrices were taken, for the manifest.

    Args:
        layer_types: layers of the parsed network by type.
        matrices: DequantizeLinear nodes in the ONNX graph.
        nodes: block-skip nodes with a factor out of one.
        coded: matrices of nodes that the plugin takes, which `_block_skip_path` looked at.

    Raises:
        InputError: some matrices are codes no longer after parsing: the plan would hold numbers.
    """
    layers = layer_types.get(_DEQUANTIZE_LAYER, 0)
    if layers < matrices:
        raise InputError(
            "TensorRT wrote low-bit codes out as numbers while parsing.",
            observed=f"{layers} layers of the kind {_DEQUANTIZE_LAYER}",
            expected=f"{matrices}, one for each quantised matrix",
            change="export with --weights float, or use the TensorRT that this was tested with",
        )
    path = "plugin" if coded else "function body" if nodes else "none"
    return {"matrices": matrices + coded, "block_skip_nodes": nodes, "path": path}
