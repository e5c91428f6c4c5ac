"""Linear layers and the embedding in few bits, as ONNX Runtime's own operators hold them.

    Linear(x, W) + c             -> MatMulNBits(x, Q(W), c)
    BlockSkip(x, A', B)          -> MatMulNBits(x1 + MatMulNBits(x2, Q(A')), Q(B))
    Gather(W, ids), W the head's -> GatherBlockQuantized(Q(W), ids), from the same bytes

Q rounds in blocks along a row (`pipeline.quantize.blocks`). The node multiplies integers: it rounds
its input to 8 bits, too, in the same blocks (accuracy_level 4), which makes it fast on CPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from pipeline.export.passes.constants import derived_weight, new_constant, shape_of, weight_shape
from pipeline.export.passes.lay_out import (
    common_name,
    is_linear,
    same_latent,
    split_between,
    take_place,
)
from pipeline.export.profile import CONTRIB
from pipeline.quantize.blocks import Blocks, quantize_blocks
from pipeline.quantize.pack import pack_codes

INTEGER_PRODUCTS = 4


@dataclass(frozen=True)
class Format:
    """How a matrix is stored.

    Attributes:
        bits: of a code, 4 or 8.
        block: weights that share a scale.
        symmetric: without zero points.
    """

    bits: int
    block: int
    symmetric: bool


# Measured (docs/cpu.md): the node rounds its input in the blocks of the weights, which costs more
# than rounding the weights does; blocks of 16 make that small. The head's input needs them less.
INT8 = Format(8, 16, True)
INT4 = Format(4, 32, False)
HEAD = Format(8, 64, True)
FORMATS = {"int8": INT8, "int4": INT4}


class Rounder:
    """Rounds weights when they are written; keeps the last one, whose parts are written in turn."""

    def __init__(self) -> None:
        self._last: tuple[str, Blocks] | None = None

    def __call__(self, name: str, style: Format, *arrays: np.ndarray) -> Blocks:
        """The weight `name`, stacked from arrays [m_i, n], rounded."""
        if self._last is None or self._last[0] != name:
            stacked = np.concatenate(arrays)
            blocks = quantize_blocks(stacked, style.bits, style.block, symmetric=style.symmetric)
            self._last = (name, blocks)
        return self._last[1]


def quantize_linears(model: ir.Model, style: Format) -> dict[str, int]:
    """Bring every linear layer into few bits, in place; the head and the embedding into 8.

    Args:
        model: traced; weights in torch's order, float32.
        style: of all but the head.

    Returns:
        How many nodes there are of each number of bits.
    """
    graph, rounder = model.graph, Rounder()
    counts: Counter[str] = Counter()
    for node in list(graph):
        if is_linear(node):
            is_head = node.outputs[0].is_graph_output()
            chosen = HEAD if is_head else style
            _linear(graph, node, chosen, rounder)
            counts[f"MatMulNBits {chosen.bits}"] += 1
    for nodes in same_latent(graph):
        _block_skip(graph, nodes, style, rounder)
        counts[f"MatMulNBits {style.bits}"] += 2
    RemoveUnusedNodesPass()(model)
    return dict(counts)


def _linear(graph: ir.Graph, node: ir.Node, style: Format, rounder: Rounder) -> None:
    x, weight = node.inputs
    gathers = [user for user, _ in weight.uses() if user.op_type == "Gather"]
    product, codes = _product(graph, node, x, [weight], weight.name, style, rounder)
    bias = _bias_behind(node)
    last = node if bias is None else bias[0]
    if bias is not None:
        product.resize_inputs(6)
        product.replace_input_with(5, bias[1])
    take_place(last, product.outputs[0])
    for gather in gathers:
        _embedding(graph, gather, weight, codes, style, rounder)
    graph.remove([last, node] if last is not node else node, safe=True)


def _bias_behind(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a constant vector that alone reads the product, and the vector."""
    uses = node.outputs[0].uses()
    user = uses[0][0] if len(uses) == 1 else None
    if user is None or user.op_type != "Add" or user.domain or node.outputs[0].is_graph_output():
        return None
    vector = next((v for v in user.inputs if v is not node.outputs[0]), None)
    shape = shape_of(vector)
    if vector is None or shape is None or len(shape) != 1:
        return None
    return user, vector


def _product(
    graph: ir.Graph,
    before: ir.Node,
    x: ir.Value,
    weights: list[ir.Value],
    name: str,
    style: Format,
    rounder: Rounder,
) -> tuple[ir.Node, ir.Value]:
    """MatMulNBits of x with stacked weights, inserted before a node; and the value of its codes."""
    rows, columns = sum(weight_shape(w)[0] for w in weights), weight_shape(weights[0])[1]
    blocks = -(-columns // style.block)
    name = name.removesuffix(".weight")

    def part(
        kind: str, shape: tuple[int, ...], dtype: ir.DataType, of: Callable[[Blocks], np.ndarray]
    ) -> ir.Value:
        return derived_weight(
            graph,
            f"{name}.{kind}",
            weights,
            shape,
            lambda *arrays: of(rounder(name, style, *arrays)).reshape(shape),
            dtype,
        )

    code_bytes = style.block * style.bits // 8
    inputs: list[ir.Value | None] = [
        x,
        part("codes", (rows, blocks, code_bytes), ir.DataType.UINT8, _codes),
        part("scales", (rows * blocks,), ir.DataType.FLOAT, lambda b: b.scales),
    ]
    if not style.symmetric:
        zero_bytes = -(-blocks * style.bits // 8)
        inputs.append(part("zeros", (rows * zero_bytes,), ir.DataType.UINT8, _zeros))
    sizes = {"K": columns, "N": rows, "bits": style.bits, "block_size": style.block}
    node = ir.node(
        "MatMulNBits",
        inputs,
        sizes | {"accuracy_level": INTEGER_PRODUCTS},
        domain=CONTRIB,
        name=name,
    )
    node.outputs[0].name = f"{name}.output"
    graph.insert_before(before, node)
    return node, inputs[1]  # type: ignore[return-value]  # the codes are there


def _codes(blocks: Blocks) -> np.ndarray:
    return pack_codes(blocks.codes, blocks.bits)


def _zeros(blocks: Blocks) -> np.ndarray:
    assert blocks.zero_points is not None
    return pack_codes(blocks.zero_points, blocks.bits)


def _embedding(
    graph: ir.Graph,
    gather: ir.Node,
    weight: ir.Value,
    codes: ir.Value,
    style: Format,
    rounder: Rounder,
) -> None:
    """Look rows up in the head's codes; [B, S, blocks, block], then joined again."""
    rows, columns = weight_shape(weight)
    blocks, name = -(-columns // style.block), weight.name.removesuffix(".weight")
    scales = derived_weight(
        graph,
        f"{name}.row_scales",
        [weight],
        (rows, blocks, 1),
        lambda array: rounder(name, style, array).scales[..., None],
        ir.DataType.FLOAT,
    )
    sizes = {"bits": style.bits, "block_size": style.block, "gather_axis": 0, "quantize_axis": 2}
    looked_up = ir.node(
        "GatherBlockQuantized", [codes, gather.inputs[1], scales], sizes, domain=CONTRIB
    )
    joined = ir.node(
        "Reshape",
        [looked_up.outputs[0], new_constant(graph, "row", np.array([0, 0, -1], np.int64))],
    )
    graph.insert_before(gather, [looked_up, joined])
    looked_up.outputs[0].name, joined.outputs[0].name = f"{name}.blocks", f"{name}.row"
    whole = joined.outputs[0]
    if blocks * style.block != columns:
        end = new_constant(graph, "row.width", np.array([columns], np.int64))
        starts, axes = (
            new_constant(graph, f"row.{kind}", np.array([number], np.int64))
            for kind, number in (("start", 0), ("axis", 2))
        )
        cut = ir.node("Slice", [whole, starts, end, axes])
        graph.insert_before(gather, cut)
        cut.outputs[0].name = f"{name}.cut"
        whole = cut.outputs[0]
    take_place(gather, whole)
    graph.remove(gather, safe=True)


def _block_skip(graph: ir.Graph, nodes: list[ir.Node], style: Format, rounder: Rounder) -> None:
    first = nodes[0]
    x, a = first.inputs[0], first.inputs[1]
    ups = [node.inputs[2] for node in nodes]
    heights = [weight_shape(up)[0] for up in ups]
    rank, rest = weight_shape(a)
    name = common_name([up.name for up in ups])
    if len(first.inputs) > 3:
        gather = ir.node("Gather", [x, first.inputs[3]], {"axis": -1}, name=f"{name}.ordered")
        graph.insert_before(first, gather)
        gather.outputs[0].name = f"{name}.x"
        x = gather.outputs[0]
    sizes = new_constant(graph, f"{name}.widths", np.array([rank, rest], np.int64))
    split = ir.node("Split", [x, sizes], {"axis": -1}, num_outputs=2, name=f"{name}.skip")
    graph.insert_before(first, split)
    split.outputs[0].name, split.outputs[1].name = f"{name}.x1", f"{name}.x2"
    mixed, _ = _product(graph, first, split.outputs[1], [a], f"{name}.a", style, rounder)
    latent = ir.node("Add", [split.outputs[0], mixed.outputs[0]], name=f"{name}.latent")
    graph.insert_before(first, latent)
    latent.outputs[0].name = f"{name}.z"
    product, _ = _product(graph, first, latent.outputs[0], ups, f"{name}.b", style, rounder)
    if len(nodes) == 1:
        take_place(first, product.outputs[0])
    else:
        split_between(graph, nodes, product.outputs[0], heights, name)
    graph.remove(nodes, safe=True)
