"""Block-skip nodes with the same input and the same `a` become one, and weights take op order.

    BlockSkip(x, A', B1), BlockSkip(x, A', B2) -> Split(BlockSkip(x, A'^T, [B1; B2]^T))

The latent is computed once, and each group of matrices is read in one stream.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pipeline.export.block_skip import DOMAIN, PLUGIN_ATTRIBUTES, VERSION, is_block_skip
from pipeline.export.passes.constants import constant_of, new_weight


def merge_shared(model: ir.Model) -> int:
    """Merge and lay out every block-skip node, in place; return how many are left."""
    graph = model.graph
    groups: dict[tuple[ir.Value | None, ...], list[ir.Node]] = {}
    for node in graph:
        if is_block_skip(node):
            index = node.inputs[3] if len(node.inputs) > 3 else None
            groups.setdefault((node.inputs[0], node.inputs[1], index), []).append(node)
    for nodes in groups.values():
        _merge(graph, nodes)
    RemoveUnusedNodesPass()(model)
    return len(groups)


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    x, a, index = first.inputs[0], first.inputs[1], first.inputs[3:]
    stacks = [constant_of(node.inputs[2]) for node in nodes]
    name = _common_name([node.inputs[2].name for node in nodes])
    weights = [
        new_weight(graph, f"{name}.a", constant_of(a).T),
        new_weight(graph, f"{name}.b", np.concatenate(stacks).T),
    ]
    merged = ir.node(
        first.op_type,
        [x, *weights, *index],
        attributes=PLUGIN_ATTRIBUTES,
        domain=DOMAIN,
        version=VERSION,
        name=name,
    )
    output = merged.outputs[0]
    output.name = f"{name}.output"
    output.type = first.outputs[0].type
    height = sum(len(stack) for stack in stacks)
    output.shape = ir.Shape([*first.outputs[0].shape[:-1], height])
    graph.insert_before(first, merged)
    if len(nodes) == 1:
        _replace(first, output)
    else:
        _split(graph, nodes, output, [len(stack) for stack in stacks], name)
    graph.remove(nodes, safe=True)
    _forget_unused(graph, [value for node in nodes for value in (node.inputs[2], a)])


def _forget_unused(graph: ir.Graph, weights: list[ir.Value | None]) -> None:
    """Drop weights at once, so that never more than one group is held twice."""
    for weight in weights:
        if weight is not None and not weight.uses() and weight.name in graph.initializers:
            del graph.initializers[weight.name]


def _split(
    graph: ir.Graph, nodes: list[ir.Node], output: ir.Value, heights: list[int], name: str
) -> None:
    sizes = new_weight(graph, f"{name}.heights", np.array(heights, dtype=np.int64))
    split = ir.node(
        "Split", [output, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{name}.split"
    )
    graph.insert_before(nodes[0], split)
    for node, part in zip(nodes, split.outputs, strict=True):
        part.name = f"{node.inputs[2].name}.part"
        _replace(node, part)


def _replace(node: ir.Node, value: ir.Value) -> None:
    old = node.outputs[0]
    value.type, value.shape = old.type, old.shape
    if old.is_graph_output():
        value.name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)


def _common_name(weights: list[str]) -> str:
    """`layers.0.self_attn.q_proj+k_proj+v_proj` from the names of the members' weights."""
    modules = [weight.split(".up.weight")[0] for weight in weights]
    return "+".join([modules[0], *(module.rsplit(".", 1)[-1] for module in modules[1:])])
