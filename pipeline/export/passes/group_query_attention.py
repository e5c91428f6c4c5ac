"""Fewer nodes around ONNX Runtime's attention, which takes what a linear layer gives.

    Reshape(Reshape(x, s), t) with the shape of x            -> x
    GQA(unhead(Rotary(head(q))), unhead(Rotary(head(k))), v) -> GQA(q, k, v, cos, sin)
    GQA(Linear(x, Wq), Linear(x, Wk), Linear(x, Wv))         -> GQA(Linear(x, [Wq; Wk; Wv]))

where head is [B, S, H D] -> [B, H, S, D]. The rotation inside the node takes tables of cos and sin
by position, and a token's position is its slot: the same wherever positions count from 0 without
gaps.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pipeline.export.contract import CONTRIB, GROUPED_ATTENTION, POSITION_IDS
from pipeline.export.passes.lay_out import LINEAR, TRACE_DOMAIN, is_linear
from pipeline.export.passes.weights import (
    constant_of,
    derived_weight,
    new_constant,
    one_format,
    stacked_rows,
    weight_shape,
)

_logger = logging.getLogger(__name__)
_HEADS_FIRST = [0, 2, 1, 3]
_TURNED_WIDTH = 16


def simplify_attention(model: ir.Model, max_length: int) -> dict[str, int]:
    """Apply the three rules in place.

    Args:
        model: traced with the profile `cpu`.
        max_length: positions in the tables of cos and sin.

    Returns:
        How many nodes of attention rotate by themselves, and how many take q, k, v as one.
    """
    nodes = [n for n in model.graph if (n.domain, n.op_type) == (CONTRIB, GROUPED_ATTENTION)]
    _drop_reshapes(model.graph)
    tables: dict[tuple[ir.Value, ir.Value], list[ir.Value]] = {}
    apart = [_rotate_inside(model, node, tables, max_length) for node in nodes]
    RemoveUnusedNodesPass()(model)  # what read q, k, v before
    loose = [_pack(model.graph, node) for node in nodes]
    for node, *reasons in zip(nodes, apart, loose, strict=True):
        for what, reason in zip(("rotate by itself", "take q, k, v as one"), reasons, strict=True):
            if reason:
                _logger.debug("%s does not %s: %s", node.name, what, reason)
    return {"rotary_in_attention": apart.count(None), "packed_qkv": loose.count(None)}


def _drop_reshapes(graph: ir.Graph) -> None:
    """Reshape pairs that lead back to the shape they started from."""
    for node in list(graph):
        inner = _producer(node.inputs[0], "Reshape") if node.op_type == "Reshape" else None
        if inner is None:
            continue
        source, result = inner.inputs[0], node.outputs[0]
        if source is not None and source.shape is not None and source.shape == result.shape:
            ir.convenience.replace_all_uses_with(result, source)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node behind a value, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.op_type == op_type else None


def _rotate_inside(
    model: ir.Model,
    node: ir.Node,
    tables: dict[tuple[ir.Value, ir.Value], list[ir.Value]],
    max_length: int,
) -> str | None:
    """Move the rotation of q and k into the node, or say why it has not the form above."""
    query, key = (_before_rotation(value) for value in node.inputs[:2])
    if query is None or key is None:
        return "q or k is not what a whole rotation of heads gives"
    if query[1] != key[1]:
        return "q and k are rotated by different angles"
    if (width := query[0].shape[3] if query[0].shape else None) is None or width % _TURNED_WIDTH:
        return f"it turns heads whose width is a multiple of {_TURNED_WIDTH}, not {width}"
    if query[1] not in tables:
        arrays = _by_position(model, query[1], max_length)
        if arrays is None:
            return "the angles depend on more than positions"
        names = ("rotary.cos", "rotary.sin")
        tables[query[1]] = [
            new_constant(model.graph, name, array)
            for name, array in zip(names, arrays, strict=True)
        ]
    for number, (source, _) in enumerate((query, key)):
        node.replace_input_with(number, _flat(model.graph, source, node, number))
    node.resize_inputs(max(9, len(node.inputs)))
    for number, table in enumerate(tables[query[1]], start=7):
        node.replace_input_with(number, table)
    node.attributes.add(ir.AttrInt64("do_rotary", 1))
    return None


def _before_rotation(value: ir.Value | None) -> tuple[ir.Value, tuple[ir.Value, ir.Value]] | None:
    """[B, S, H, D] before Transpose, RotaryEmbedding, Transpose, Reshape; and its cos and sin."""
    reshape = _producer(value, "Reshape")
    back = _producer(reshape.inputs[0], "Transpose") if reshape else None
    rotary = _producer(back.inputs[0], "RotaryEmbedding") if back else None
    turn = _producer(rotary.inputs[0], "Transpose") if rotary else None
    if back is None or rotary is None or turn is None or len(rotary.inputs) > 3:
        return None
    turns = [node.attributes.get_ints("perm") for node in (back, turn)]
    if any(list(perm) != _HEADS_FIRST for perm in turns) or _is_partial(rotary):
        return None
    source, cos, sin = turn.inputs[0], rotary.inputs[1], rotary.inputs[2]
    return None if source is None or cos is None or sin is None else (source, (cos, sin))


def _is_partial(rotary: ir.Node) -> bool:
    """Whether it turns neighbours, or only a part of each head."""
    return any(
        rotary.attributes.get_int(name, 0) for name in ("interleaved", "rotary_embedding_dim")
    )


def _flat(graph: ir.Graph, source: ir.Value, node: ir.Node, number: int) -> ir.Value:
    """[B, S, H D] of [B, S, H, D]: what was reshaped, or a new Reshape."""
    inner = _producer(source, "Reshape")
    if inner is not None and inner.inputs[0] is not None and len(inner.inputs[0].shape or ()) == 3:
        return inner.inputs[0]
    shape = new_constant(graph, "heads.joined", np.array([0, 0, -1], np.int64))
    reshape = ir.node("Reshape", [source, shape])
    graph.insert_before(node, reshape)
    reshape.outputs[0].name = f"{source.name}.joined.{number}"
    return reshape.outputs[0]


def _by_position(
    model: ir.Model, values: tuple[ir.Value, ir.Value], max_length: int
) -> list[np.ndarray] | None:
    """Cos and sin [max_length, D / 2], computed from position_ids by the graph's own nodes.

    None where they depend on anything else, such as the length of the text.
    """
    positions = next(v for v in model.graph.inputs if v.name == POSITION_IDS)
    nodes = _upstream(values, positions)
    if nodes is None:
        return None
    ordered = [node for node in model.graph if node in nodes]
    constants = {
        value.name: array
        for node in ordered
        for value in node.inputs
        if (array := constant_of(value)) is not None and value.producer() is None
    }
    helper = onnx.helper
    part = helper.make_graph(
        [ir.serde.serialize_node(node) for node in ordered],
        "rotary",
        [helper.make_tensor_value_info(positions.name, onnx.TensorProto.INT64, None)],
        [helper.make_tensor_value_info(v.name, onnx.TensorProto.FLOAT, None) for v in values],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", model.graph.opset_imports[""])
    feed = {positions.name: np.arange(max_length, dtype=np.int64)[None]}
    evaluator = ReferenceEvaluator(helper.make_model(part, opset_imports=[opset]))
    return [np.asarray(table)[0] for table in evaluator.run(None, feed)]


def _upstream(values: tuple[ir.Value, ...], source: ir.Value) -> set[ir.Node] | None:
    """The nodes between `source`, constants, and `values`; None if something else goes in."""
    nodes: set[ir.Node] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value is source or (node is None and value.const_value is not None):
            continue
        if node is None:
            return None
        if node not in nodes:
            nodes.add(node)
            waiting += [v for v in node.inputs if v is not None]
    return nodes


def _pack(graph: ir.Graph, node: ir.Node) -> str | None:
    """Give attention q, k and v as one product, or say why they are not three of the same input."""
    parts = [value.producer() if value is not None else None for value in node.inputs[:3]]
    linears = [p for p in parts if p and is_linear(p)]
    alone = all(len(p.outputs[0].uses()) == 1 for p in linears)
    if len(linears) < 3:
        return "they are not three products of dense matrices"
    if not alone or len({p.inputs[0] for p in linears}) > 1:
        return "they have different inputs, or something else reads them"
    if not node.attributes.get_int("do_rotary", 0):
        return "it rejects packed rows that it need not turn"
    weights = [p.inputs[1] for p in linears]
    if not one_format(weights):
        return "their matrices are stored in different formats"
    height = sum(weight_shape(w)[0] for w in weights)
    names = [w.name.removesuffix(".weight") for w in weights]
    name = "+".join([names[0], *(n.rsplit(".", 1)[-1] for n in names[1:])])
    stacked = derived_weight(
        graph,
        f"{name}.weight",
        weights,
        (height, weight_shape(weights[0])[1]),
        stacked_rows,
        moves_rows=True,
    )
    product = ir.node(LINEAR, [linears[0].inputs[0], stacked], domain=TRACE_DOMAIN, name=name)
    product.outputs[0].name = f"{name}.output"
    product.outputs[0].type = linears[0].outputs[0].type
    product.outputs[0].shape = ir.Shape([*linears[0].outputs[0].shape[:-1], height])
    graph.insert_before(node, product)
    node.replace_input_with(0, product.outputs[0])
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)
    graph.remove(linears, safe=True)
    return None
