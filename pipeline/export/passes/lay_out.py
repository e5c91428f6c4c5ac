"""Traced linear layers become the operators that runtimes know, weights in their order.

    BlockSkip(x, A', B1), BlockSkip(x, A', B2) -> Split(BlockSkip(x, A'^T, [B1; B2]^T))
    Linear(x, W)                               -> MatMul(x, W^T)

Nodes with the same input and the same A' become one: the latent is computed once, and each group
of matrices is read in one stream. A weight that something else reads as it is (the embedding that
is tied to the head) is stored once, and transposed by a node.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pipeline.export.block_skip import PLUGIN_ATTRIBUTES, is_block_skip
from pipeline.export.contract import DOMAIN, OP_VERSION
from pipeline.export.passes.weights import derived_weight, new_constant, weight_shape

# A linear layer as it is traced: (x, W [m, n]).
TRACE_DOMAIN, LINEAR = "skipcat.trace", "Linear"


def lay_out(model: ir.Model) -> int:
    """Bring every linear layer into its final form, in place; return the block-skip nodes left.

    What no node reads goes with it: this is the last pass.
    """
    graph = model.graph
    groups = same_latent(graph)
    for node in list(graph):
        if is_linear(node):
            _matmul(graph, node)
    for nodes in groups:
        _merge(graph, nodes)
    RemoveUnusedNodesPass()(model)
    return len(groups)


def is_linear(node: ir.Node) -> bool:
    """Whether a node is a traced linear layer."""
    return (node.domain, node.op_type) == (TRACE_DOMAIN, LINEAR)


def same_latent(graph: ir.Graph) -> list[list[ir.Node]]:
    """Block-skip nodes, those with one input, one A' and one index together."""
    groups: dict[tuple[ir.Value | None, ...], list[ir.Node]] = {}
    for node in graph:
        if is_block_skip(node):
            index = node.inputs[3] if len(node.inputs) > 3 else None
            groups.setdefault((node.inputs[0], node.inputs[1], index), []).append(node)
    return list(groups.values())


def _matmul(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = node.inputs
    name = weight.name.removesuffix(".weight")
    if any(user is not node for user, _ in weight.uses()):
        turn = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}.transpose")
        graph.insert_before(node, turn)
        transposed = turn.outputs[0]
        transposed.name = f"{name}.transposed"
    else:
        rows, columns = weight_shape(weight)
        transposed = derived_weight(
            graph, f"{weight.name}.T", [weight], (columns, rows), np.transpose
        )
    product = ir.node("MatMul", [x, transposed], name=name)
    product.outputs[0].name = f"{name}.output"
    graph.insert_before(node, product)
    take_place(node, product.outputs[0])
    graph.remove(node, safe=True)


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    x, a, index = first.inputs[0], first.inputs[1], first.inputs[3:]
    ups = [node.inputs[2] for node in nodes]
    heights = [weight_shape(up)[0] for up in ups]
    rank, rest = weight_shape(a)
    name = common_name([up.name for up in ups])
    weights = [
        derived_weight(graph, f"{name}.a", [a], (rest, rank), np.transpose),
        derived_weight(graph, f"{name}.b", ups, (rank, sum(heights)), _stack_and_transpose),
    ]
    merged = ir.node(
        first.op_type,
        [x, *weights, *index],
        attributes=PLUGIN_ATTRIBUTES,
        domain=DOMAIN,
        version=OP_VERSION,
        name=name,
    )
    output = merged.outputs[0]
    output.name = f"{name}.output"
    output.type = first.outputs[0].type
    output.shape = ir.Shape([*first.outputs[0].shape[:-1], sum(heights)])
    graph.insert_before(first, merged)
    if len(nodes) == 1:
        take_place(first, output)
    else:
        split_between(graph, nodes, output, heights, name)
    graph.remove(nodes, safe=True)


def _stack_and_transpose(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays).T


def split_between(
    graph: ir.Graph, nodes: list[ir.Node], output: ir.Value, heights: list[int], name: str
) -> None:
    """Let the parts of `output` take the place of the nodes' outputs, in their order."""
    sizes = new_constant(graph, f"{name}.heights", np.array(heights, dtype=np.int64))
    split = ir.node(
        "Split", [output, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{name}.split"
    )
    graph.insert_before(nodes[0], split)
    for node, part in zip(nodes, split.outputs, strict=True):
        part.name = f"{node.inputs[2].name}.part"
        take_place(node, part)


def take_place(node: ir.Node, value: ir.Value) -> None:
    """Let `value` take the place of a node's only output."""
    old = node.outputs[0]
    value.type, value.shape = old.type, old.shape
    if old.is_graph_output():
        value.name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)


def common_name(weights: list[str]) -> str:
    """`layers.0.self_attn.q_proj+k_proj+v_proj` from the names of the members' weights."""
    modules = [weight.split(".up.weight")[0] for weight in weights]
    return "+".join([modules[0], *(module.rsplit(".", 1)[-1] for module in modules[1:])])
