"""Quantised linear layers, as ONNX itself holds them: DequantizeLinear before the product.

    Linear(x, Q)        -> MatMul(x, DequantizeLinear(Q^T, scales^T))
    BlockSkip(x, A', B) -> BlockSkipLinearFewBits(x, DequantizeLinear(A'^T), DequantizeLinear(B^T))

Blocks run along the inputs, which is axis 0 of what MatMul takes. TensorRT multiplies with the
codes as they are, also where the product is in the body of a function. A matrix that is one block
to a row has one scale for each output.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from pipeline.export.contract import (
    DEQUANTIZE,
    QUANTIZED_SKIP,
    QUANTIZED_SKIP_INDEXED,
)
from pipeline.export.passes.lay_out import (
    SharedLatent,
    is_linear,
    take_place,
)
from pipeline.export.passes.weights import (
    StoredCodes,
    derived_weight,
    moved_rows,
    one_format,
    quantized_lookups,
    stacked_rows,
    weight_shape,
)
from pipeline.quantize.groupwise import Blocks

_ROWS_AXIS, _COLUMNS_AXIS = 0, 1


def dequantize_linears(model: ir.Model) -> dict[str, int]:
    """Give products the codes that the checkpoint holds, in place; others stay as they are.

    Args:
        model: traced; weights in torch's order. Every format in it is symmetric, of 4 bits in
            blocks or of 8 bits by row.

    Returns:
        How many matrices there are of each number of bits.
    """
    counts: Counter[str] = Counter()
    for node in list(model.graph):
        codes = StoredCodes.of(node.inputs[1]) if is_linear(node) else None
        if codes is not None:
            _linear(model.graph, node)
            counts[f"{DEQUANTIZE} {codes.format.bits}"] += 1
    for group in SharedLatent.all_of(model.graph):
        parts = [[group.first.inputs[1]], group.ups]
        formats = [codes.format for part in parts if (codes := _common_codes(part)) is not None]
        if formats:
            _block_skip(group)
            counts.update(f"{DEQUANTIZE} {format_.bits}" for format_ in formats)
    for gather, codes in quantized_lookups(model.graph):
        weight = gather.inputs[0]
        name, dtype = weight.name.removesuffix(".weight"), gather.outputs[0].dtype
        values = _dequantized(model.graph, gather, [weight], name, dtype)
        _look_up(model.graph, gather, values, name)
        counts[f"{DEQUANTIZE} {codes.format.bits}"] += 1
    return dict(counts)


def _common_codes(weights: list[ir.Value]) -> StoredCodes | None:
    """The codes of the first of some matrices, if all are in its format."""
    return StoredCodes.of(weights[0]) if one_format(weights) else None


def _linear(graph: ir.Graph, node: ir.Node) -> None:
    x, weight = node.inputs
    name = weight.name.removesuffix(".weight")
    matrix = _dequantized(graph, node, [weight], name, x.dtype)
    product = ir.node("MatMul", [x, matrix], name=name)
    product.outputs[0].name = f"{name}.output"
    graph.insert_before(node, product)
    take_place(node, product.outputs[0])
    for gather in [user for user, _ in weight.uses() if user.op_type == "Gather"]:
        _embedding(graph, gather, matrix.producer(), name)
    graph.remove(node, safe=True)


def _embedding(graph: ir.Graph, gather: ir.Node, source: ir.Node | None, name: str) -> None:
    """Look rows up in the matrix that the head's codes stand for."""
    assert source is not None
    values = ir.node(DEQUANTIZE, source.inputs, {n: a.value for n, a in source.attributes.items()})
    values.outputs[0].name = f"{name}.embedded"
    graph.insert_before(gather, values)
    _look_up(graph, gather, values.outputs[0], name)


def _look_up(graph: ir.Graph, gather: ir.Node, values: ir.Value, name: str) -> None:
    """Look rows of W up in W^T, turned back."""
    turned = ir.node("Transpose", [values], {"perm": [1, 0]}, name=f"{name}.table")
    looked_up = ir.node("Gather", [turned.outputs[0], gather.inputs[1]])
    for node, last in ((turned, "rows"), (looked_up, "row")):
        node.outputs[0].name = f"{name}.{last}"
    graph.insert_before(gather, [turned, looked_up])
    take_place(gather, looked_up.outputs[0])
    graph.remove(gather, safe=True)


def _matrix(
    graph: ir.Graph, before: ir.Node, weights: list[ir.Value], name: str, dtype: ir.DataType
) -> ir.Value:
    """W^T [n, m] of a stack: from its codes, by a node inserted before another, or as numbers."""
    if _common_codes(weights) is not None:
        return _dequantized(graph, before, weights, name, dtype)
    shape = (weight_shape(weights[0])[1], sum(weight_shape(weight)[0] for weight in weights))
    return derived_weight(
        graph, f"{name}.T", weights, shape, lambda *arrays: np.concatenate(arrays).T
    )


def _dequantized(
    graph: ir.Graph, before: ir.Node, weights: list[ir.Value], name: str, dtype: ir.DataType
) -> ir.Value:
    """W^T [n, m] of a stack from its codes, by a node inserted before another."""
    codes, scales, attributes = _codes_and_scales(graph, weights, name, dtype)
    node = ir.node(DEQUANTIZE, [codes, scales], attributes, name=f"{name}.dequantized")
    node.outputs[0].name = f"{name}.values"
    graph.insert_before(before, node)
    return node.outputs[0]


def _codes_and_scales(
    graph: ir.Graph, weights: list[ir.Value], name: str, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value, dict[str, int]]:
    """Codes [n, m] and scales of a stack, and the attributes of DequantizeLinear for them."""
    noted = [codes for weight in weights if (codes := StoredCodes.of(weight)) is not None]
    assert one_format(weights)
    format_ = noted[0].format
    rows, columns = sum(weight_shape(w)[0] for w in weights), weight_shape(weights[0])[1]
    by_row, kind = format_.block == 0, ir.DataType.INT4 if format_.bits == 4 else ir.DataType.INT8

    def read() -> Blocks:
        return moved_rows([codes.read() for codes in noted], stacked_rows)

    def codes_array() -> np.ndarray:
        blocks = read()
        centred = blocks.codes.astype(np.int16) - 2 ** (blocks.bits - 1)
        return centred.reshape(rows, -1)[:, :columns].T.astype(kind.numpy())

    def scales_array() -> np.ndarray:
        scales = read().scales.astype(dtype.numpy())
        return scales[:, 0] if by_row else scales.T

    scale_shape = (rows,) if by_row else (format_.blocks(columns), rows)
    codes = derived_weight(graph, f"{name}.codes", [], (columns, rows), codes_array, kind)
    scales = derived_weight(graph, f"{name}.scales", [], scale_shape, scales_array, dtype)
    if by_row:
        return codes, scales, {"axis": _COLUMNS_AXIS}
    return codes, scales, {"axis": _ROWS_AXIS, "block_size": format_.block}


def _block_skip(group: SharedLatent) -> None:
    x, a, index = group.first.inputs[0], group.first.inputs[1], group.first.inputs[3:]
    factors = [
        _matrix(group.graph, group.first, weights, f"{group.name}.{letter}", x.dtype)
        for letter, weights in (("a", [a]), ("b", group.ups))
    ]
    group.become(QUANTIZED_SKIP_INDEXED if index else QUANTIZED_SKIP, factors)
