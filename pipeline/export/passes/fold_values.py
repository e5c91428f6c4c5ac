"""What is cached of values, mapped back behind attention: in the matrix behind it where that pays.

    mixed up + mean, Transpose, Reshape, Linear(W)  ->  Transpose, Reshape, Linear(W'), + b'
        W'_h = W_h up_h^T,  b' = sum of W_h mean_h over the query heads h

A node maps what attention gives of every head, [B, H, S, rank], by its key/value head's `up`. W'
takes its place where it is no larger than W and `up` are, and W is a matrix of numbers that
nothing else reads; elsewhere the node becomes a product for each head.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import torch

from pipeline.export.contract import OP_VERSION
from pipeline.export.passes.lay_out import TRACE_DOMAIN, is_linear, take_place
from pipeline.export.passes.weights import (
    StoredCodes,
    constant_of,
    derived_weight,
    new_constant,
    weight_shape,
)

_MAP_VALUES = "MapValues"
VALUES_FOLDED = "maps of values in the matrix behind"  # as export.json counts them
_logger = logging.getLogger(__name__)


def map_values(mixed: torch.Tensor, up: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The node, while a model is traced: values [B, H, S, D].

    Args:
        mixed: [B, H, S, rank], mixtures of latents whose weights sum up to 1.
        up: [kv heads, rank, D].
        mean: [kv heads, 1, D].
    """
    return torch.onnx.ops.symbolic(
        f"{TRACE_DOMAIN}::{_MAP_VALUES}",
        (mixed, up, mean),
        dtype=mixed.dtype,
        shape=(*mixed.shape[:3], up.shape[2]),
        version=OP_VERSION,
    )


def fold_values(model: ir.Model) -> int:
    """Fold or write out every such node, in place; return how many were folded."""
    folded = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) == (TRACE_DOMAIN, _MAP_VALUES):
            reason = _fold(model.graph, node)
            folded += reason is None
            if reason:
                _logger.debug("%s stays a product of its own: %s", node.name, reason)
                _write_out(model.graph, node)
    return folded


def _fold(graph: ir.Graph, node: ir.Node) -> str | None:
    """Fold a node into the matrix behind it, or say what stands in the way."""
    mixed, up, mean = node.inputs
    turn = _only_user(node, "Transpose")
    shaped = None if turn is None else _only_user(turn, "Reshape")
    linear = None if shaped is None else _only_user(shaped)
    if turn is None or linear is None or not is_linear(linear):
        return "there is no linear layer behind it"
    if list(turn.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return "its heads are put in another order"
    weight = linear.inputs[1]
    if StoredCodes.of(weight) is not None or len(list(weight.uses())) > 1:
        return "the matrix behind it is quantised, or read elsewhere"
    (rows, columns), (kv_heads, rank, width) = weight_shape(weight), weight_shape(up)
    heads = columns // width
    if rows * heads * rank > rows * columns + kv_heads * rank * width:
        return "the matrix behind it would become larger than both"
    _replace(graph, linear, turn, [mixed, up, mean], (rows, heads, rank))
    return None


def _replace(
    graph: ir.Graph, linear: ir.Node, turn: ir.Node, own: list[ir.Value], sizes: tuple[int, ...]
) -> None:
    """Put the linear layer of the folded matrix in the place of another."""
    weight, (mixed, up, mean), (rows, heads, rank) = linear.inputs[1], own, sizes
    name = weight.name.removesuffix(".weight")
    folded = derived_weight(
        graph, f"{name}.latent.weight", [weight, up], (rows, heads * rank), _folded
    )
    bias = derived_weight(graph, f"{name}.latent.bias", [weight, mean], (rows,), _folded_mean)
    flat = new_constant(graph, "flat_heads", np.array([0, 0, heads * rank], np.int64))
    turned = ir.node("Transpose", [mixed], {"perm": [0, 2, 1, 3]}, name=f"{name}.latent.turn")
    shaped = ir.node("Reshape", [turned.outputs[0], flat], name=f"{name}.latent.heads")
    product = ir.node(
        linear.op_type, [shaped.outputs[0], folded], domain=linear.domain, version=OP_VERSION,
        name=f"{name}.latent",
    )  # fmt: skip
    total = ir.node("Add", [product.outputs[0], bias], name=f"{name}.latent.add")
    output = linear.outputs[0]
    batch, _, length, _ = mixed.shape
    shapes = [(batch, length, heads, rank), (batch, length, heads * rank), output.shape]
    for one, shape in zip((turned, shaped, product), shapes, strict=True):
        _describe(one, output, shape)
    total.outputs[0].name = f"{name}.latent.sum"
    graph.insert_before(linear, [turned, shaped, product, total])
    take_place(linear, total.outputs[0])
    graph.remove(linear, safe=True)


def _folded(weight: np.ndarray, up: np.ndarray) -> np.ndarray:
    """W' [rows, heads * rank] of W [rows, heads * D] and up [kv heads, rank, D]."""
    by_head = _by_kv_head(weight, up)
    return (
        np.einsum("okgd,krd->okgr", by_head, up.astype(np.float32))
        .reshape(len(weight), -1)
        .astype(weight.dtype)
    )


def _folded_mean(weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """What the means add, b' [rows]."""
    by_head = _by_kv_head(weight, mean)
    return np.einsum("okgd,kd->o", by_head, mean[:, 0].astype(np.float32)).astype(weight.dtype)


def _by_kv_head(weight: np.ndarray, other: np.ndarray) -> np.ndarray:
    """W [rows, kv heads, queries that share one, D], to multiply in float32."""
    kv_heads, _, width = other.shape
    return weight.astype(np.float32).reshape(len(weight), kv_heads, -1, width)


def _write_out(graph: ir.Graph, node: ir.Node) -> None:
    """A product for each key/value head, whose queries are rows of it."""
    mixed, up, mean = node.inputs
    (kv_heads, rank, width), heads = weight_shape(up), int(mixed.shape[1])
    name = up.name
    if (array := constant_of(mean)) is None:
        raise TypeError(f"{mean.name} is computed")
    means = new_constant(graph, f"{name}.means", np.repeat(array, heads // kv_heads, axis=0))
    shapes = [
        new_constant(graph, f"{name}.{kind}", np.array(shape, np.int64))
        for kind, shape in (("rows", [0, kv_heads, -1, rank]), ("heads", [0, heads, -1, width]))
    ]
    rows = ir.node("Reshape", [mixed, shapes[0]], name=f"{name}.by_kv_head")
    product = ir.node("MatMul", [rows.outputs[0], up], name=f"{name}.product")
    back = ir.node("Reshape", [product.outputs[0], shapes[1]], name=f"{name}.by_head")
    total = ir.node("Add", [back.outputs[0], means], name=f"{name}.add")
    batch, _, length, _ = mixed.shape
    several = ir.SymbolicDim(None)
    _describe(rows, mixed, (batch, kv_heads, several, rank))
    _describe(product, mixed, (batch, kv_heads, several, width))
    _describe(back, mixed, (batch, heads, length, width))
    total.outputs[0].name = f"{name}.values"
    graph.insert_before(node, [rows, product, back, total])
    take_place(node, total.outputs[0])
    graph.remove(node, safe=True)


def _describe(node: ir.Node, like: ir.Value, shape: ir.Shape | tuple[object, ...]) -> None:
    """Name, type and shape of a node's output."""
    output = node.outputs[0]
    output.name, output.type = f"{node.name}.output", like.type
    output.shape = shape if isinstance(shape, ir.Shape) else ir.Shape(shape)


def _only_user(node: ir.Node, op_type: str | None = None) -> ir.Node | None:
    """The only node that reads a node's output, if it is of a type, and not the graph's caller."""
    output = node.outputs[0]
    users = [user for user, _ in output.uses()]
    if len(users) != 1 or output.is_graph_output():
        return None
    return users[0] if op_type in (None, users[0].op_type) else None
