"""Permute the rows of the layers before a block-skip node instead of its input.

    BlockSkipLinearIndexed(f(L1(u), L2(v), ...), a, b, p)
        -> BlockSkipLinear(f(P L1(u), P L2(v), ...), a, b)

for f elementwise, because f(P g, P h) = P f(g, h), and P (W u + c) = (P W) u + P c. It holds for
the down projection of a gated MLP, and costs nothing at run time.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pipeline.export.block_skip import is_block_skip
from pipeline.export.contract import BLOCK_SKIP, BLOCK_SKIP_INDEXED
from pipeline.export.passes.lay_out import is_linear
from pipeline.export.passes.weights import constant_of, derived_weight, shape_of, weight_shape

_logger = logging.getLogger(__name__)
_ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Erf",
    "Sigmoid", "Tanh", "Relu", "Gelu", "Silu", "Swish", "Softplus", "Clip", "Cast", "Identity",
}  # fmt: skip


@dataclass
class _Region:
    """All values between some linear layers and one block-skip node.

    Attributes:
        values: those that will be permuted.
        constants: (node, input number) of vectors that must be permuted with them.
        weights: (node, input number, axis) of the linears' weights.
    """

    values: set[ir.Value] = field(default_factory=set)
    constants: list[tuple[ir.Node, int]] = field(default_factory=list)
    weights: list[tuple[ir.Node, int, int]] = field(default_factory=list)


def fold_permutations(model: ir.Model) -> tuple[int, list[str]]:
    """Fold where the algebra allows it, in place; weights still in torch's order.

    Returns:
        How many nodes lost their index, and for every other one why it kept it.
    """
    folded, kept = 0, []
    for node in list(model.graph):
        if not (is_block_skip(node) and node.op_type == BLOCK_SKIP_INDEXED):
            continue
        region = _Region()
        index = constant_of(node.inputs[3])
        if index is None:
            reason: str | None = "its index is not constant"
        else:
            reason = _collect(node.inputs[0], len(index), region) or _escapes(region, node)
        if index is None or reason:
            kept.append(f"{node.name}: {reason}")
            _logger.debug("%s keeps its index: %s", node.name, reason)
            continue
        _permute(model.graph, region, index)
        _drop_index(node)
        folded += 1
    return folded, kept


def _collect(value: ir.Value, width: int, region: _Region) -> str | None:
    """Walk back from `value` to the linears that feed it; return what stands in the way."""
    if value in region.values:
        return None
    region.values.add(value)
    node = value.producer()
    if node is None:
        return f"{value.name} is an input of the graph"
    if is_block_skip(node):
        region.weights.append((node, 2, 0))
        return None
    if is_linear(node):
        region.weights.append((node, 1, 0))
        return None
    if node.domain or node.op_type not in _ELEMENTWISE:
        return f"{node.op_type} is not elementwise"
    for number, operand in enumerate(node.inputs):
        if operand is None:
            continue
        shape = shape_of(operand)
        if shape is None:
            reason = _collect(operand, width, region)
            if reason:
                return reason
        elif shape and shape[-1] == width:
            region.constants.append((node, number))
        elif math.prod(shape) != 1:
            return f"{node.op_type} broadcasts a constant of shape {shape}"
    return None


def _escapes(region: _Region, consumer: ir.Node) -> str | None:
    """A value in the region that something outside it reads, too."""
    inside = {value.producer() for value in region.values}
    for value in region.values:
        if value.is_graph_output():
            return f"{value.name} is an output of the graph"
        for user, _ in value.uses():
            if user is not consumer and user not in inside:
                return f"{value.name} is read by {user.op_type}, too"
    return None


def _permute(graph: ir.Graph, region: _Region, index: np.ndarray) -> None:
    """Reorder the weights and vectors of a region; each use gets a copy of its own."""
    places = [(node, number, axis) for node, number, axis in region.weights]
    places += [(node, number, -1) for node, number in region.constants]
    for node, number, axis in places:
        old = node.inputs[number]
        ordered = derived_weight(
            graph,
            f"{old.name}.ordered",
            [old],
            weight_shape(old),
            lambda array, axis=axis: np.take(array, index, axis=axis),
            moves_rows=axis == 0,
        )
        node.replace_input_with(number, ordered)


def _drop_index(node: ir.Node) -> None:
    node.op_type = BLOCK_SKIP
    node.resize_inputs(3)
