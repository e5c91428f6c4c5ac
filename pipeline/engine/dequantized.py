"""Nodes of codes as TensorRT multiplies them without our plugin: out of DequantizeLinear.

    LinearQuantized4(x, b, b_scale) -> MatMul(x, DequantizeLinear(b, b_scale))
    BlockSkipLinearA4B8(x, a, a_scale, b, b_scale)
        -> BlockSkipLinearFewBits(x, DequantizeLinear(a, a_scale), DequantizeLinear(b, b_scale))

The plan holds the codes. In no other form would it: TensorRT takes an int8 constant before
DequantizeLinear or a plugin alone, and refuses the body by which ONNX Runtime runs the node. Half
bytes become INT4 where they lie, for the bytes are the same; only those of an odd width are packed
anew. Blocks are written whatever the opset, which TensorRT's parser does not ask for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.export.contract import (
    BLOCK_A,
    BLOCK_B,
    DEQUANTIZE,
    DEQUANTIZED_SKIP,
    DEQUANTIZED_SKIP_INDEXED,
    DOMAIN,
    LINEAR_QUANTIZED,
    QUANTIZED_OPS,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx


@dataclass(frozen=True)
class _Dequantized:
    """What `dequantize_nodes` made of a graph.

    Attributes:
        matrices: DequantizeLinear nodes that were added.
        skips: block-skip nodes that read them.
    """

    matrices: int
    skips: int


def dequantize_nodes(model: onnx.ModelProto, folder: Path) -> _Dequantized:
    """Rewrite every node of codes, in place.

    Args:
        model: without its external weights.
        folder: where they lie.
    """
    rewriting = _Rewriting(model, folder)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        ours = node.domain == DOMAIN and node.op_type in QUANTIZED_OPS
        nodes += rewriting.products_of(node) if ours else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    rewriting.finish()
    added = [node.op_type for node in nodes].count(DEQUANTIZE) - rewriting.before
    return _Dequantized(added, rewriting.skips)


class _Rewriting:
    """One graph while its nodes of codes become products of DequantizeLinear."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self.model, self.folder, self.skips = model, folder, 0
        self.before = [node.op_type for node in model.graph.node].count(DEQUANTIZE)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._bodies: set[str] = set()

    def products_of(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """DequantizeLinear for each matrix of codes, and the node that reads them."""
        from onnx import helper

        blocks = {item.name: item.i for item in node.attribute}
        added: list[onnx.NodeProto] = []
        inputs, rest = [node.input[0]], list(node.input[1:])
        dense = node.op_type.startswith(LINEAR_QUANTIZED)
        for block in (BLOCK_B,) if dense else (BLOCK_A, BLOCK_B):
            matrix = rest.pop(0)
            if block in blocks:
                added.append(self._dequantize(matrix, rest.pop(0), blocks[block], node))
                matrix = added[-1].output[0]
            inputs.append(matrix)
        if dense:
            return [*added, helper.make_node("MatMul", inputs, node.output, name=node.name)]
        op_type = DEQUANTIZED_SKIP_INDEXED if rest else DEQUANTIZED_SKIP
        self.skips += 1
        self._bodies.add(op_type)
        skip = helper.make_node(
            op_type, [*inputs, *rest], node.output, name=node.name, domain=DOMAIN
        )
        return [*added, skip]

    def finish(self) -> None:
        """Leave the bodies that are still used, and no tensor that is not."""
        import onnx_ir as ir

        from pipeline.export.block_skip import function_bodies

        kept = [f for f in self.model.functions if f.name not in QUANTIZED_OPS]
        opset = next(entry.version for entry in self.model.opset_import if not entry.domain)
        missing = self._bodies - {function.name for function in kept}
        for body in function_bodies(opset, missing).values():
            kept.append(ir.serde.serialize_function(body))
        del self.model.functions[:]
        self.model.functions.extend(kept)
        read = {name for node in self.model.graph.node for name in node.input}
        read |= {output.name for output in self.model.graph.output}
        tensors = [tensor for name, tensor in self._tensors.items() if name in read]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(tensors)

    def _dequantize(
        self, codes: str, scales: str, block: int, node: onnx.NodeProto
    ) -> onnx.NodeProto:
        """The node that stands for one matrix [rows, columns], which shares both tensors."""
        from onnx import helper

        stored, scale = self._tensors[codes], self._tensors[scales]
        rows, (groups, columns) = stored.dims[0], scale.dims
        whole = stored.dims[1] == columns
        attributes: dict[str, Any] = {"axis": 0, "block_size": block}
        if whole and groups == 1:
            # One scale to a column, which TensorRT knows as an axis alone.
            attributes = {"axis": 1}
            scales = self._view(scale, f"{scales}.of_columns", [columns]).name
        if not whole:
            codes = self._four_bits(stored, [rows, columns])
        output = f"{node.output[0]}/{codes}"
        return helper.make_node(DEQUANTIZE, [codes, scales], [output], name=output, **attributes)

    def _view(self, tensor: onnx.TensorProto, name: str, dims: list[int]) -> onnx.TensorProto:
        """The same bytes under another name and shape."""
        if name not in self._tensors:
            copy = type(tensor)()
            copy.CopyFrom(tensor)
            copy.name = name
            copy.dims[:] = dims
            self._tensors[name] = copy
        return self._tensors[name]

    def _four_bits(self, stored: onnx.TensorProto, dims: list[int]) -> str:
        """Half bytes as INT4, whose rows do not end at whole bytes."""
        from onnx import TensorProto

        view = self._view(stored, f"{stored.name}.int4", dims)
        if view.data_type != TensorProto.INT4:
            view.data_type = TensorProto.INT4
            if dims[1] % 2:
                self._pack_anew(stored, view)
        return view.name

    def _pack_anew(self, stored: onnx.TensorProto, view: onnx.TensorProto) -> None:
        from onnx import TensorProto, external_data_helper, numpy_helper

        read = TensorProto()
        read.CopyFrom(stored)
        if external_data_helper.uses_external_data(read):
            external_data_helper.load_external_data_for_tensor(read, str(self.folder))
        halves = _without_filling(numpy_helper.to_array(read), view.dims[1])
        view.raw_data = halves.tobytes()
        view.data_location = TensorProto.DEFAULT
        del view.external_data[:]


def _without_filling(packed: np.ndarray, columns: int) -> np.ndarray:
    """Half bytes of rows that end at whole bytes, int8 [n, (m + 1) / 2], one after another."""
    import numpy as np

    halves = packed.view(np.uint8)[..., None] >> np.array([0, 4], np.uint8) & 15
    flat = halves.reshape(len(packed), -1)[:, :columns].reshape(-1)
    flat = np.pad(flat, (0, len(flat) % 2))
    both: np.ndarray = flat[::2] | flat[1::2] << 4
    return both
