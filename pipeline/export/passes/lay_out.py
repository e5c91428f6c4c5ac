"""Traced linear layers become the operators that runtimes know, weights in their order.

    BlockSkip(x, A', B1), BlockSkip(x, A', B2) -> Split(BlockSkip(x, A'^T, [B1; B2]^T))
    Linear(x, W)                               -> MatMul(x, W^T)

Nodes with the same input and the same A' become one: the latent is computed once, and each group
of matrices is read in one stream. A weight that something else reads as it is (the embedding that
is tied to the head) is stored once, and transposed by a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    groups = SharedLatent.all_of(graph)
    for node in list(graph):
        if is_linear(node):
            _matmul(graph, node)
    for group in groups:
        _merge(group)
    RemoveUnusedNodesPass()(model)
    return len(groups)


@dataclass(frozen=True)
class SharedLatent:
    """Block-skip nodes with one input, one A' and one index, which become one.

    Attributes:
        graph: theirs.
        nodes: in its order, at least one.
    """

    graph: ir.Graph
    nodes: list[ir.Node]

    @staticmethod
    def all_of(graph: ir.Graph) -> list[SharedLatent]:
        """Every block-skip node of a graph, in one of these."""
        groups: dict[tuple[ir.Value | None, ...], list[ir.Node]] = {}
        for node in graph:
            if is_block_skip(node):
                index = node.inputs[3] if len(node.inputs) > 3 else None
                groups.setdefault((node.inputs[0], node.inputs[1], index), []).append(node)
        return [SharedLatent(graph, nodes) for nodes in groups.values()]

    @property
    def first(self) -> ir.Node:
        """What takes their place is inserted before it; its inputs x, A' and index are theirs."""
        return self.nodes[0]

    @property
    def ups(self) -> list[ir.Value]:
        """B of each."""
        return [node.inputs[2] for node in self.nodes]

    @property
    def name(self) -> str:
        """`layers.0.self_attn.q_proj+k_proj+v_proj` from the names of the members' weights."""
        modules = [up.name.split(".up.weight")[0] for up in self.ups]
        return "+".join([modules[0], *(module.rsplit(".", 1)[-1] for module in modules[1:])])

    def become(
        self,
        op_type: str,
        factors: list[ir.Value],
        attributes: Mapping[str, str | int] | None = None,
    ) -> None:
        """Put one node of ours in their place, which takes x, the factors and the index."""
        x, index, shape = self.first.inputs[0], self.first.inputs[3:], self.first.outputs[0].shape
        inputs = [x, *factors, *index]
        node = ir.node(
            op_type, inputs, attributes, domain=DOMAIN, version=OP_VERSION, name=self.name
        )
        output = node.outputs[0]
        output.name, output.type = f"{self.name}.output", self.first.outputs[0].type
        output.shape = ir.Shape([*shape[:-1], sum(self._heights)])
        self.graph.insert_before(self.first, node)
        self.give_way(output)

    def give_way(self, output: ir.Value) -> None:
        """Let `output`, or the parts of it, take the place of their outputs, and remove them."""
        if len(self.nodes) == 1:
            take_place(self.first, output)
        else:
            self._split(output)
        self.graph.remove(self.nodes, safe=True)

    @property
    def _heights(self) -> list[int]:
        return [weight_shape(up)[0] for up in self.ups]

    def _split(self, output: ir.Value) -> None:
        heights = np.array(self._heights, dtype=np.int64)
        sizes = new_constant(self.graph, f"{self.name}.heights", heights)
        count, name = len(self.nodes), f"{self.name}.split"
        split = ir.node("Split", [output, sizes], {"axis": -1}, num_outputs=count, name=name)
        self.graph.insert_before(self.first, split)
        for node, part in zip(self.nodes, split.outputs, strict=True):
            part.name = f"{node.inputs[2].name}.part"
            take_place(node, part)


def _merge(group: SharedLatent) -> None:
    a, ups, name = group.first.inputs[1], group.ups, group.name
    rank, rest = weight_shape(a)
    height = sum(weight_shape(up)[0] for up in ups)
    a = derived_weight(group.graph, f"{name}.a", [a], (rest, rank), np.transpose)
    b = derived_weight(group.graph, f"{name}.b", ups, (rank, height), _stack_and_transpose)
    group.become(group.first.op_type, [a, b], PLUGIN_ATTRIBUTES)


def is_linear(node: ir.Node) -> bool:
    """Whether a node is a traced linear layer."""
    return (node.domain, node.op_type) == (TRACE_DOMAIN, LINEAR)


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


def _stack_and_transpose(*arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays).T


def take_place(node: ir.Node, value: ir.Value) -> None:
    """Let `value` take the place of a node's only output."""
    old = node.outputs[0]
    value.type, value.shape = old.type, old.shape
    if old.is_graph_output():
        value.name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
