"""The graph for a TensorRT that has nothing to write a cache in place with: there the cache grows.

    CacheWrite(past [B, H, L, W], new, first)  ->  Concat(past [B, H, P, W], new)

A graph of the profile `compat-static` reads the cache's length from the cache itself, and where
new tokens go from the mask. So it means the same over a cache that holds P tokens and is handed
back with S more, once what asked for the length asks the cache with the new tokens in it: the first
that is written, which waits for no attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import InputError
from pipeline.export.contract import CACHE_PREFIX, CACHE_WRITE, COMPAT, DOMAIN, present_name

if TYPE_CHECKING:
    import onnx

_LENGTH_AXIS = 2
_PAST_LENGTH, _PRESENT_LENGTH = "past_sequence_length", "present_sequence_length"
Shapes = dict[str, tuple[int | None, ...]]


def growing_inputs(inputs: Shapes) -> Shapes:
    """Shapes of the inputs once the cache grows: its length is free."""
    return {
        name: (*shape[:_LENGTH_AXIS], None, *shape[_LENGTH_AXIS + 1 :])
        if name.startswith(CACHE_PREFIX)
        else shape
        for name, shape in inputs.items()
    }


def let_cache_grow(model: onnx.ModelProto) -> None:
    """Change a graph whose cache has a fixed length into one whose cache grows.

    Args:
        model: of the profile `compat-static`; changed. Its function is removed with its nodes.

    Raises:
        InputError: a node asks a cache for more than its length.
    """
    from onnx import helper

    graph = model.graph
    first = next(node.output[0] for node in graph.node if _is_write(node))
    nodes = []
    for node in graph.node:
        if _is_write(node):
            past, new, _ = node.input
            node = helper.make_node(
                "Concat", [past, new], list(node.output), name=node.name, axis=_LENGTH_AXIS
            )
        elif _asks_for_length(node):
            _require_length_alone(node)
            node.input[0] = first
        nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    _free_length(graph)
    _put_in_order(model)


def _put_in_order(model: onnx.ModelProto) -> None:
    """Sort nodes behind those that they read, and drop nodes and functions that nothing needs."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

    sorted_model = ir.serde.deserialize_model(model)
    sorted_model.graph.sort()
    for drop in (RemoveUnusedNodesPass(), RemoveUnusedFunctionsPass()):
        drop(sorted_model)
    model.CopyFrom(ir.serde.serialize_model(sorted_model))


def _is_write(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, CACHE_WRITE)


def _asks_for_length(node: onnx.NodeProto) -> bool:
    asks = node.op_type == "Shape" and node.input[0].startswith(CACHE_PREFIX)
    return asks and _LENGTH_AXIS in _axes_of(node)


def _axes_of(shape: onnx.NodeProto) -> range:
    """Axes of four that a Shape node returns."""
    ends = {attribute.name: attribute.i for attribute in shape.attribute}
    return range(4)[ends.get("start", 0) : ends.get("end", 4)]


def _require_length_alone(shape: onnx.NodeProto) -> None:
    """Raise InputError for a node whose other sizes may be of this cache alone."""
    if [*_axes_of(shape)] != [_LENGTH_AXIS]:
        raise InputError(
            "The cache of this graph cannot be made to grow.",
            where=f"{shape.op_type} '{shape.name}'",
            observed=f"axes {[*_axes_of(shape)]} of {shape.input[0]}",
            expected=f"axis {_LENGTH_AXIS}",
            change=f"export the checkpoint again with --profile {COMPAT}",
        )


def _free_length(graph: onnx.GraphProto) -> None:
    """Name the length of the cache, in place of a number."""
    cached = {value.name: value for value in graph.input if value.name.startswith(CACHE_PREFIX)}
    presents = {present_name(name) for name in cached}
    present = [value for value in graph.output if value.name in presents]
    for length, values in ((_PAST_LENGTH, cached.values()), (_PRESENT_LENGTH, present)):
        for value in values:
            value.type.tensor_type.shape.dim[_LENGTH_AXIS].dim_param = length
