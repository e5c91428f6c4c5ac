"""Quantised linear layers keep their codes, laid out as the kernels of our ops read them.

    Linear(x, Q)        -> LinearQuantized4(x, codes of Q^T, scales^T)
    BlockSkip(x, A', B) -> BlockSkipLinearA4B8(x, codes of A'^T, scales, codes of B^T, scales)
    Gather(Q, ids)      -> Gather(Transpose(DequantizeLinear(codes of Q^T, scales)), ids)

Blocks run along the inputs, which is axis 0 of what a product takes. A matrix that is one block to
a row has one scale for each output.

Rows are looked up through DequantizeLinear, for TensorRT takes int8 constants nowhere else but in
plugins. A table of bytes that is the head as well is one tensor for both. One of half bytes would
be two, of int8 and INT4: there the head, too, reads numbers out of DequantizeLinear, as it would
with no kernel of ours. Opsets that know no blocks look such a table up in numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pipeline.export.block_skip import PLUGIN_ATTRIBUTES
from pipeline.export.contract import (
    BLOCK_A,
    BLOCK_B,
    BLOCKED_OPSET,
    BYTES,
    DEQUANTIZE,
    DOMAIN,
    LINEAR_QUANTIZED,
    NIBBLES,
    NUMBERS,
    OP_VERSION,
    block_skip_op,
    form_of,
)
from pipeline.export.passes.lay_out import SharedLatent, is_linear, take_place
from pipeline.export.passes.weights import (
    StoredCodes,
    derived_weight,
    moved_rows,
    one_format,
    quantized_lookups,
    stacked_rows,
    weight_shape,
)
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks
from pipeline.quantize.kernel_codes import kernel_block, kernel_codes, signed_codes

_ROWS_AXIS, _COLUMNS_AXIS = 0, 1
_HALF = 4  # bits of half a byte


def keep_codes(model: ir.Model) -> dict[str, int]:
    """Give products the codes that the checkpoint holds, in place; others stay as they are.

    Args:
        model: traced; weights in torch's order. Every format in it is symmetric, of 4 bits in
            blocks or of 8 bits by row.

    Returns:
        How many matrices are codes in our ops, and how many in DequantizeLinear, by bits.
    """
    graph, blocks_known = model.graph, model.opset_imports[""] >= BLOCKED_OPSET
    counts: Counter[str] = Counter()
    for node in list(graph):
        codes = StoredCodes.of(node.inputs[1]) if is_linear(node) else None
        if codes is not None:
            counts[_linear(graph, node, codes, blocks_known)] += 1
    for group in SharedLatent.all_of(graph):
        formats = [codes for part in _parts(group) if (codes := _common_codes(part))]
        if formats:
            _block_skip(group)
            counts.update(_kept(codes) for codes in formats)
    for gather, codes in quantized_lookups(graph):
        if blocks_known or codes.format.bits != _HALF:
            weight = gather.inputs[0]
            name = weight.name.removesuffix(".weight")
            values = _Stack(graph, [weight], name).dequantized(gather, blocks_known)
            _look_up(graph, gather, values, name)
            counts[f"{DEQUANTIZE} {codes.format.bits}"] += 1
    return dict(counts)


def _kept(codes: StoredCodes) -> str:
    return f"codes {codes.format.bits}"


def _parts(group: SharedLatent) -> list[list[ir.Value]]:
    """A', and the stack of every B."""
    return [[group.first.inputs[1]], group.ups]


def _common_codes(weights: list[ir.Value]) -> StoredCodes | None:
    """The codes of the first of some matrices, if all are in its format."""
    return StoredCodes.of(weights[0]) if one_format(weights) else None


def _linear(graph: ir.Graph, node: ir.Node, codes: StoredCodes, blocks_known: bool) -> str:
    """Give one dense layer its codes, and those who look rows up in them; how they are kept."""
    x, weight = node.inputs
    gathers = [user for user, _ in weight.uses() if user.op_type == "Gather"]
    stack = _Stack(graph, [weight], weight.name.removesuffix(".weight"))
    half = codes.format.bits == _HALF
    looked_up = [] if half and not blocks_known else gathers
    shared = half and bool(looked_up)
    if shared:
        product = ir.node("MatMul", [x, stack.dequantized(node, blocks_known)], name=stack.name)
    else:
        inputs, attributes = stack.kept(x.dtype, BLOCK_B)
        product = ir.node(
            LINEAR_QUANTIZED + form_of(codes.format.bits), [x, *inputs],
            PLUGIN_ATTRIBUTES | attributes, domain=DOMAIN, version=OP_VERSION, name=stack.name,
        )  # fmt: skip
    product.outputs[0].name = f"{stack.name}.output"
    graph.insert_before(node, product)
    take_place(node, product.outputs[0])
    for gather in looked_up:
        values = stack.dequantized(gather, blocks_known, "embedded")
        _look_up(graph, gather, values, stack.name)
    graph.remove(node, safe=True)
    return f"{DEQUANTIZE} {codes.format.bits}" if shared else _kept(codes)


def _look_up(graph: ir.Graph, gather: ir.Node, values: ir.Value, name: str) -> None:
    """Look rows of W up in W^T, turned back, in the type that was looked up."""
    turned = ir.node("Transpose", [values], {"perm": [1, 0]}, name=f"{name}.table")
    looked_up = ir.node("Gather", [turned.outputs[0], gather.inputs[1]])
    added = [turned, looked_up]
    dtype = gather.outputs[0].dtype
    if values.dtype != dtype:
        added.append(ir.node("Cast", looked_up.outputs, {"to": int(dtype)}))
    for node, last in zip(added, ("rows", "row", "typed"), strict=False):
        node.outputs[0].name = f"{name}.{last}"
    graph.insert_before(gather, added)
    take_place(gather, added[-1].outputs[0])
    graph.remove(gather, safe=True)


def _block_skip(group: SharedLatent) -> None:
    x, index = group.first.inputs[0], group.first.inputs[3:]
    factors: list[ir.Value] = []
    forms: list[str] = []
    attributes: dict[str, str | int] = dict(PLUGIN_ATTRIBUTES)
    for letter, block, weights in zip("ab", (BLOCK_A, BLOCK_B), _parts(group), strict=True):
        stack, codes = (
            _Stack(group.graph, weights, f"{group.name}.{letter}"),
            _common_codes(weights),
        )
        if codes is None:
            factors.append(stack.numbers())
            forms.append(NUMBERS)
            continue
        inputs, described = stack.kept(x.dtype, block)
        factors += inputs
        attributes |= described
        forms.append(form_of(codes.format.bits))
    group.become(block_skip_op(forms[0], forms[1], bool(index)), factors, attributes)


class _Stack:
    """Matrices of one format one below the other, [m, n] in all, as a graph holds W^T.

    Tensors are added where they are asked for, and once.

    Args:
        graph: gets them.
        weights: with the codes noted on them.
        name: what theirs begin with.
    """

    def __init__(self, graph: ir.Graph, weights: list[ir.Value], name: str) -> None:
        self.graph, self.weights, self.name = graph, weights, name
        self.rows = sum(weight_shape(weight)[0] for weight in weights)
        self.columns = weight_shape(weights[0])[1]
        self._made: dict[str, ir.Value] = {}

    def numbers(self) -> ir.Value:
        """W^T [n, m], as it is."""
        return derived_weight(
            self.graph, f"{self.name}.T", self.weights, (self.columns, self.rows),
            lambda *arrays: np.concatenate(arrays).T,
        )  # fmt: skip

    def kept(self, dtype: ir.DataType, block_name: str) -> tuple[list[ir.Value], dict[str, int]]:
        """Codes and scales for an op of ours, and the attribute that says how many rows share."""
        shape = (self._format.blocks(self.columns), self.rows)
        scales = self._scales("scales", shape, dtype)
        codes = self._halves() if form_of(self._format.bits) == NIBBLES else self._whole()
        return [codes, scales], {block_name: kernel_block(self._format, self.columns)}

    def dequantized(self, before: ir.Node, blocks_known: bool, last: str = "values") -> ir.Value:
        """W^T [n, m] out of DequantizeLinear, inserted before a node; float32 without blocks."""
        dtype = before.outputs[0].dtype if blocks_known else ir.DataType.FLOAT
        if form_of(self._format.bits) == BYTES:
            inputs = [self._whole(), self._scales("row_scales", (self.rows,), dtype)]
            attributes = {"axis": _COLUMNS_AXIS}
        else:
            shape = (self._format.blocks(self.columns), self.rows)
            inputs = [self._four_bits(), self._scales("block_scales", shape, dtype)]
            attributes = {"axis": _ROWS_AXIS, "block_size": self._format.block}
        node = ir.node(DEQUANTIZE, inputs, attributes, name=f"{self.name}.{last}.dequantized")
        node.outputs[0].name, node.outputs[0].dtype = f"{self.name}.{last}", dtype
        self.graph.insert_before(before, node)
        return node.outputs[0]

    @property
    def _noted(self) -> list[StoredCodes]:
        assert one_format(self.weights)
        return [codes for weight in self.weights if (codes := StoredCodes.of(weight)) is not None]

    @property
    def _format(self) -> Format:
        return self._noted[0].format

    def _read(self) -> Blocks:
        return moved_rows([codes.read() for codes in self._noted], stacked_rows)

    def _codes(
        self, columns: int, array: Callable[[], np.ndarray], kind: ir.DataType = ir.DataType.INT8
    ) -> ir.Value:
        if "codes" not in self._made:
            shape, name = (self.columns, columns), f"{self.name}.codes"
            self._made["codes"] = derived_weight(self.graph, name, [], shape, array, kind)
        return self._made["codes"]

    def _whole(self) -> ir.Value:
        return self._codes(self.rows, lambda: kernel_codes(self._read()))

    def _four_bits(self) -> ir.Value:
        kind = ir.DataType.INT4
        return self._codes(self.rows, lambda: signed_codes(self._read()).astype(kind.numpy()), kind)

    def _halves(self) -> ir.Value:
        return self._codes(-(-self.rows // 2), lambda: kernel_codes(self._read()))

    def _scales(self, last: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        def array() -> np.ndarray:
            return self._read().scales.astype(dtype.numpy()).T.reshape(shape)

        if last not in self._made:
            name = f"{self.name}.{last}"
            self._made[last] = derived_weight(self.graph, name, [], shape, array, dtype)
        return self._made[last]
