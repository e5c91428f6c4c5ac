"""The exporter's second trace, left out where it would find what the first one found.

torch's exporter traces a program again to decompose it into operators that it has translations of,
which is half of an export's time. A decoder's operators are such already, but for a few that mean
nothing or have a twin.

    to(x, dtype) = x, where x is of that type; else _to_copy(x, dtype)
    x & y = bitwise_and(x, y), reshape(x) = view(x), of a copy where x is strided, contiguous(x) = x

What holds anything else, or changes a tensor in place, is traced again as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads

_TRACED_AGAIN = _fx_passes.decompose_with_registry
_ATEN = torch.ops.aten
_ASSERTIONS = {_ATEN._assert_scalar.default, _ATEN._assert_tensor_metadata.default}


def decomposed(program: ExportedProgram, registry: Any) -> ExportedProgram:
    """A program in operators that the exporter has translations of; changed in place where it can.

    Args:
        program: as `torch.export` traced it.
        registry: torch's `ONNXRegistry`.
    """
    graph = program.graph
    known = set(get_onnx_implemented_overloads(registry))
    if not all(_is_translated(node, known) for node in graph.nodes):
        return _TRACED_AGAIN(program, registry)
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.target not in known else None
        if rewrite is not None:
            with graph.inserting_before(node):
                twin = rewrite(graph, node)
            node.replace_all_uses_with(twin)
            program.graph_signature.replace_all_uses(node.name, twin.name)
            graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _is_translated(node: Node, known: set[Any]) -> bool:
    """Whether a node needs no decomposition, or has a twin that needs none."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # arithmetic of lengths
        return not isinstance(target, torch._ops.OperatorBase)
    if target._schema.is_mutable:
        return False
    return target in known or target in _ASSERTIONS or target in _REWRITES


def _cast(graph: Graph, node: Node) -> Node:
    """`to`, whichever of its forms: the type is what the result has."""
    x, wanted = _operand(graph, node), node.meta["val"].dtype
    if x.meta["val"].dtype == wanted:
        return x
    return _twin(graph, node, _ATEN._to_copy.default, (x,), {"dtype": wanted})


def _reshaped(graph: Graph, node: Node) -> Node:
    """`reshape`, which copies where the tensor does not lie in order."""
    x, shape = _operand(graph, node), node.args[1]
    if not x.meta["val"].is_contiguous():
        how = {"memory_format": torch.contiguous_format}
        copy = _twin(graph, node, _ATEN.clone.default, (x,), how)
        copy.meta["val"] = x.meta["val"].contiguous()
        x = copy
    return _twin(graph, node, _ATEN.view.default, (x, shape), {})


def _renamed(target: Any) -> Callable[[Graph, Node], Node]:
    return lambda graph, node: _twin(graph, node, target, node.args, node.kwargs)


def _operand(graph: Graph, node: Node) -> Node:
    """The tensor that a node is about, which is also what one that does nothing becomes."""
    x = node.args[0]
    assert isinstance(x, Node)
    return x


def _twin(graph: Graph, node: Node, target: Any, args: Any, keywords: Any) -> Node:
    made = graph.call_function(target, args, keywords)
    made.meta = dict(node.meta)
    return made


_REWRITES: dict[Any, Callable[[Graph, Node], Node]] = {
    _ATEN.to.dtype: _cast,
    _ATEN.to.device: _cast,
    _ATEN.to.dtype_layout: _cast,
    _ATEN.contiguous.default: _operand,
    _ATEN.reshape.default: _reshaped,
    _ATEN.__and__.Tensor: _renamed(_ATEN.bitwise_and.Tensor),
    _ATEN.__or__.Tensor: _renamed(_ATEN.bitwise_or.Tensor),
}
