"""Quantised linear layers and embedding, as ONNX Runtime's own operators hold them.

    Linear(x, W) + c             -> MatMulBlocks(x, Q(W), c)
    BlockSkip(x, A', B)          -> BlockSkipBlocks(x, Q(A'), Q(B))
    Gather(W, ids), W the head's -> LookUpBlocks(ids, Q(W)), from the same bytes

Q rounds in blocks along a row (`quantize.groupwise`). MatMulBlocks is an operator of ours
(`export/matmul_blocks.py`), whose body is ONNX Runtime's MatMulNBits. It multiplies integers: its
input is rounded to 8 bits, too, in the same blocks, which makes it fast on CPUs. BlockSkipBlocks is
two such products in one node. Where one factor is numbers there is a node for each step, and where
products should be of floats, MatMulNBits itself.

Offsets of blocks are a small product of their own beside one whose codes count from the middle:
w = code * scale + offset is (code - 2^(bits - 1)) * scale + rest, with one `rest` for each block,
and ONNX Runtime has fast kernels for the first part alone. With s the sums of x over the blocks:

    W x                            = MatMulNBits(x, Q) + rest s
    rows of W, blocks side by side = GatherBlockQuantized(Q, ids) + rest[ids]

`rest` has one number where W has `block` of them. Sums and their product stay in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from pipeline.export.contract import (
    BLOCK_A,
    BLOCK_B,
    BLOCK_SKIP_BLOCKS,
    BLOCK_SKIP_BLOCKS_OPS,
    CONTRIB,
    DOMAIN,
    INT4,
    INT4_OFFSET,
    INT8,
    INTEGER,
    MATMUL_BLOCKS,
    MATMUL_BLOCKS_OPS,
    MATMUL_NBITS,
    OP_VERSION,
    PRODUCTS,
)
from pipeline.export.passes.block_sums import BlockSums, add_rests
from pipeline.export.passes.gather_nbits import look_up_rows
from pipeline.export.passes.lay_out import (
    SharedLatent,
    is_linear,
    take_place,
)
from pipeline.export.passes.weights import (
    StoredCodes,
    derived_weight,
    moved_rows,
    new_constant,
    one_format,
    quantized_lookups,
    shape_of,
    stacked_rows,
    weight_shape,
)
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks, pack_codes, quantize_blocks

# Measured (docs/cpu.md): the node rounds its input in the blocks of the weights, which costs more
# than rounding the weights does; blocks of 16 make that small. The head's input needs them less.
FORMATS = {
    INT8: Format(8, 16, "sym"),
    INT4: Format(4, 32, "asym"),
    INT4_OFFSET: Format(4, 32, "offset"),
}
_HEAD = Format(8, 64, "sym")


class _Rounder:
    """Reads or rounds weights when they are written; keeps the last one, written in parts."""

    def __init__(self) -> None:
        self._last: tuple[str, Blocks] | None = None

    def __call__(self, name: str, format_: Format, weights: list[ir.Value]) -> Blocks:
        """The stack of weights [m_i, n] under `name`: its stored codes, or rounded here."""
        if self._last is None or self._last[0] != name:
            stored = [codes.read() for w in weights if (codes := StoredCodes.of(w)) is not None]
            if stored:
                self._last = (name, moved_rows(stored, stacked_rows))
            else:
                stacked = np.concatenate([_array_of(weight) for weight in weights])
                blocks = quantize_blocks(stacked, format_.bits, format_.block, zero=format_.zero)
                self._last = (name, blocks)
        return self._last[1]


def _array_of(weight: ir.Value) -> np.ndarray:
    tensor = ir.convenience.get_const_tensor(weight)
    assert tensor is not None
    return tensor.numpy()


@dataclass
class _Pass:
    """What all steps need to know.

    Attributes:
        graph: changed in place.
        format: of matrices that the checkpoint does not hold quantised; None leaves them.
        accuracy: `accuracy_level` of the nodes.
        rounder: of their weights.
        counts: how many matrices there are of each number of bits, by the operator.
        sums: of inputs, for formats with offsets.
    """

    graph: ir.Graph
    format: Format | None
    accuracy: int
    rounder: _Rounder = field(default_factory=_Rounder)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.sums = BlockSums(self.graph)

    def format_of(self, weights: list[ir.Value], other: Format | None) -> Format | None:
        """The format that weights are stored in, or `other`."""
        codes = StoredCodes.of(weights[0])
        return codes.format if codes is not None and one_format(weights) else other


def quantize_linears(
    model: ir.Model, format_: Format | None, *, accuracy: int = PRODUCTS[INTEGER]
) -> dict[str, int]:
    """Quantise linear layers, in place.

    Matrices that the checkpoint holds quantised keep their codes. The others are rounded to
    `format_`, the head and the embedding to 8 bits; without a format they stay as they are.

    Args:
        model: traced; weights in torch's order, float32.
        format_: of matrices that are not quantised yet.
        accuracy: 4 rounds the inputs of products to 8 bits, too; 0 multiplies in float32.

    Returns:
        How many matrices there are of each number of bits, by the operator that takes them.
    """
    work = _Pass(model.graph, format_, accuracy)
    for node in list(model.graph):
        if is_linear(node):
            is_head = node.outputs[0].is_graph_output()
            other = _HEAD if is_head and format_ is not None else format_
            chosen = work.format_of([node.inputs[1]], other)
            if chosen is not None:
                _linear(work, node, chosen)
    for group in SharedLatent.all_of(model.graph):
        parts = [[group.first.inputs[1]], group.ups]
        if any(work.format_of(weights, format_) is not None for weights in parts):
            _block_skip(work, group)
    for gather, found in quantized_lookups(work.graph):
        weight = gather.inputs[0]
        name = weight.name.removesuffix(".weight")
        codes = _part(work, name, "codes", found.format, [weight])
        operator = _embedding(work, gather, weight, codes, found.format)
        work.counts[f"{operator} {found.format.bits}"] += 1
    return dict(work.counts)


def _linear(work: _Pass, node: ir.Node, format_: Format) -> None:
    x, weight = node.inputs
    gathers = [user for user, _ in weight.uses() if user.op_type == "Gather"]
    bias = _bias_behind(node)
    last, vector = (node, None) if bias is None else bias
    product, codes = _product(work, node, x, [weight], weight.name, format_, vector)
    take_place(last, product)
    for gather in gathers:
        _embedding(work, gather, weight, codes, format_)
    work.graph.remove([last, node] if last is not node else node, safe=True)


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
    work: _Pass,
    before: ir.Node,
    x: ir.Value,
    weights: list[ir.Value],
    name: str,
    format_: Format,
    bias: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value]:
    """The product of x with stacked weights, inserted before a node, and the value of its codes."""
    rows, columns = sum(weight_shape(w)[0] for w in weights), weight_shape(weights[0])[1]
    name = name.removesuffix(".weight")
    inputs = [x, *_parts(work, name, format_, weights)]
    sizes = {"K": columns, "N": rows, "bits": format_.bits, "block_size": format_.block}
    if work.accuracy == PRODUCTS[INTEGER]:
        op_type = MATMUL_BLOCKS_OPS[format_.zero, bias is not None]
        inputs += [] if bias is None else [bias]
        node = ir.node(op_type, inputs, sizes, domain=DOMAIN, version=OP_VERSION, name=name)
        product = _insert_product(work, before, node, format_)
    else:
        product = _float_product(work, before, inputs, sizes, name, format_, bias)
    return product, inputs[1]


def _parts(work: _Pass, name: str, format_: Format, weights: list[ir.Value]) -> list[ir.Value]:
    """Inputs that hold stacked weights, in the order of our operators."""
    kinds = ["codes", "scales"]
    kinds += {"sym": [], "asym": ["zeros"], "offset": ["rests"]}[format_.zero]
    parts = [_part(work, name, kind, format_, weights) for kind in kinds]
    if format_.zero == "offset" and work.accuracy == PRODUCTS[INTEGER]:
        parts.append(work.sums.block_ones(weight_shape(weights[0])[1], format_.block))
    return parts


def _insert_product(work: _Pass, before: ir.Node, node: ir.Node, format_: Format) -> ir.Value:
    """Insert a node of codes and count it; its output."""
    node.outputs[0].name = f"{node.name}.output"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)  # which no checker knows of the domain
    work.graph.insert_before(before, node)
    kinds = (BLOCK_SKIP_BLOCKS, MATMUL_BLOCKS, MATMUL_NBITS)
    kind = next(kind for kind in kinds if node.op_type.startswith(kind))
    work.counts[f"{kind} {format_.bits}"] += 1
    return node.outputs[0]


def _float_product(
    work: _Pass,
    before: ir.Node,
    inputs: list[ir.Value],
    sizes: dict[str, int],
    name: str,
    format_: Format,
    bias: ir.Value | None,
) -> ir.Value:
    """MatMulNBits, which rounds no input here, and what offsets add."""
    accuracy = {"accuracy_level": work.accuracy}
    rests = inputs.pop() if format_.zero == "offset" else None
    node = ir.node(MATMUL_NBITS, inputs, sizes | accuracy, domain=CONTRIB, name=name)
    if bias is not None:
        node.resize_inputs(6)
        node.replace_input_with(5, bias)
    product = _insert_product(work, before, node, format_)
    if rests is not None:
        sums = work.sums(inputs[0], sizes["K"], format_.block)
        product = add_rests(work.graph, before, product, sums, rests)
    return product


def _part(work: _Pass, name: str, kind: str, format_: Format, weights: list[ir.Value]) -> ir.Value:
    """Codes, scales or zeros of stacked weights as MatMulNBits wants them, or their rests."""
    rows, columns = sum(weight_shape(w)[0] for w in weights), weight_shape(weights[0])[1]
    blocks = format_.blocks(columns)
    bytes_, float_ = ir.DataType.UINT8, ir.DataType.FLOAT
    parts: dict[str, tuple[tuple[int, ...], ir.DataType, Callable[[Blocks], np.ndarray]]] = {
        "codes": ((rows, blocks, format_.block * format_.bits // 8), bytes_, _codes),
        "scales": ((rows * blocks,), float_, lambda found: found.scales),
        "zeros": ((rows * -(-blocks * format_.bits // 8),), bytes_, _zeros),
        "rests": ((blocks, rows), float_, lambda found: found.rests.T),
    }
    shape, dtype, of = parts[kind]

    def make() -> np.ndarray:
        return of(work.rounder(name, format_, weights)).reshape(shape)

    return derived_weight(work.graph, f"{name}.{kind}", [], shape, make, dtype)


def _any_product(
    work: _Pass,
    before: ir.Node,
    x: ir.Value,
    weights: list[ir.Value],
    name: str,
) -> ir.Value:
    """The product of x with stacked weights: quantised, or as numbers where nothing says so."""
    format_ = work.format_of(weights, work.format)
    if format_ is not None:
        return _product(work, before, x, weights, name, format_)[0]
    rows, columns = sum(weight_shape(w)[0] for w in weights), weight_shape(weights[0])[1]
    turned = derived_weight(
        work.graph,
        f"{name}.T",
        weights,
        (columns, rows),
        lambda *arrays: np.concatenate(arrays).T,
    )
    product = ir.node("MatMul", [x, turned], name=name)
    product.outputs[0].name = f"{name}.output"
    work.graph.insert_before(before, product)
    return product.outputs[0]


def _codes(blocks: Blocks) -> np.ndarray:
    return pack_codes(blocks.codes, blocks.bits)


def _zeros(blocks: Blocks) -> np.ndarray:
    assert blocks.zero_points is not None
    return pack_codes(blocks.zero_points, blocks.bits)


def _embedding(
    work: _Pass, gather: ir.Node, weight: ir.Value, codes: ir.Value, format_: Format
) -> str:
    """Look rows up in the codes of a matrix, and return the operator that does."""
    name = weight.name.removesuffix(".weight")
    return look_up_rows(
        work.graph,
        gather,
        codes,
        format_,
        lambda: work.rounder(name, format_, [weight]),
        kernel=work.accuracy == PRODUCTS[INTEGER],
    )


def _block_skip(work: _Pass, group: SharedLatent) -> None:
    """One node where both factors are codes; else a node for each step."""
    a = group.first.inputs[1]
    of_a, of_b = (work.format_of(weights, work.format) for weights in ([a], group.ups))
    if of_a is None or of_b is None or work.accuracy != PRODUCTS[INTEGER]:
        _apart(work, group)
        return
    rank, rest = weight_shape(a)
    x, name = group.first.inputs[0], group.name.removesuffix(".weight")
    index = list(group.first.inputs[3:])
    factors = [*_parts(work, f"{name}.a", of_a, [a]), *_parts(work, f"{name}.b", of_b, group.ups)]
    sizes = {
        "N": sum(weight_shape(up)[0] for up in group.ups),
        "rank": rank,
        "rest": rest,
        "bits_a": of_a.bits,
        BLOCK_A: of_a.block,
        "bits_b": of_b.bits,
        BLOCK_B: of_b.block,
    }
    op_type = BLOCK_SKIP_BLOCKS_OPS[of_a.zero, of_b.zero, bool(index)]
    inputs = [x, *index, *factors]
    node = ir.node(op_type, inputs, sizes, domain=DOMAIN, version=OP_VERSION, name=name)
    product = _insert_product(work, group.first, node, of_a)
    work.counts[f"{BLOCK_SKIP_BLOCKS} {of_b.bits}"] += 1
    group.give_way(product)


def _apart(work: _Pass, group: SharedLatent) -> None:
    """The latent and the product with B, step by step."""
    graph, first, name = work.graph, group.first, group.name
    x, a = first.inputs[0], first.inputs[1]
    rank, rest = weight_shape(a)
    if len(first.inputs) > 3:
        gather = ir.node("Gather", [x, first.inputs[3]], {"axis": -1}, name=f"{name}.ordered")
        graph.insert_before(first, gather)
        gather.outputs[0].name = f"{name}.x"
        x = gather.outputs[0]
    sizes = new_constant(graph, f"{name}.widths", np.array([rank, rest], np.int64))
    split = ir.node("Split", [x, sizes], {"axis": -1}, num_outputs=2, name=f"{name}.skip")
    graph.insert_before(first, split)
    split.outputs[0].name, split.outputs[1].name = f"{name}.x1", f"{name}.x2"
    mixed = _any_product(work, first, split.outputs[1], [a], f"{name}.a")
    latent = ir.node("Add", [split.outputs[0], mixed], name=f"{name}.latent")
    graph.insert_before(first, latent)
    latent.outputs[0].name = f"{name}.z"
    group.give_way(_any_product(work, first, latent.outputs[0], group.ups, f"{name}.b"))
