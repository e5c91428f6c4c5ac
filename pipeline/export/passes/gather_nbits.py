"""Rows of an embedding looked up in quantised codes, which may be those that the head reads.

    Gather(W, ids) -> LookUpBlocks(ids, Q(W))
    Gather(W, ids) -> Reshape(GatherBlockQuantized(Q(W), ids)), cut to the width of a row

The first is an operator of ours, whose body is the second, and whose kernel looks into the head's
codes as they lie in memory. Formats with offsets take the second, and so do graphs whose products
are of floats. ONNX Runtime wants one scale and one zero point to an element of its own, so they are
stored again in that shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pipeline.export.contract import (
    CONTRIB,
    DOMAIN,
    GATHER_NBITS,
    LOOK_UP_BLOCKS_OPS,
    OP_VERSION,
)
from pipeline.export.passes.lay_out import take_place
from pipeline.export.passes.weights import derived_weight, new_constant, weight_shape
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks


def look_up_rows(
    graph: ir.Graph,
    gather: ir.Node,
    codes: ir.Value,
    format_: Format,
    read: Callable[[], Blocks],
    *,
    kernel: bool,
) -> None:
    """Let codes take the place of the weight that a Gather reads.

    Args:
        graph: changed in place.
        gather: the look-up; its output is [B, S, columns].
        codes: [rows, blocks, bytes].
        format_: of the codes.
        read: the codes with their scales and zero points, when they are written.
        kernel: take the operator of ours, if it has the format.
    """
    weight, ids = gather.inputs
    rows, columns = weight_shape(weight)
    blocks, name = format_.blocks(columns), weight.name.removesuffix(".weight")

    def table(kind: str, dtype: ir.DataType, of: Callable[[Blocks], np.ndarray | None]) -> ir.Value:
        return derived_weight(
            graph,
            f"{name}.{kind}",
            [],
            (rows, blocks, 1),
            lambda: np.asarray(of(read()))[..., None],
            dtype,
        )

    tables = [table("row_scales", ir.DataType.FLOAT, lambda found: found.scales)]
    if format_.zero == "asym":  # here one to a byte
        tables.append(table("row_zeros", ir.DataType.UINT8, lambda found: found.zero_points))
    own = {"bits": format_.bits, "block_size": format_.block}
    if kernel and format_.zero in LOOK_UP_BLOCKS_OPS:
        op_type = LOOK_UP_BLOCKS_OPS[format_.zero]
        shape = {"K": columns, "N": rows} | own
        inputs = [ids, codes, *tables]
        node = ir.node(
            op_type, inputs, shape, domain=DOMAIN, version=OP_VERSION, name=f"{name}.rows"
        )
        node.outputs[0].name = f"{name}.row"
        graph.insert_before(gather, node)
        take_place(gather, node.outputs[0])
        graph.remove(gather, safe=True)
        return
    sizes = own | {"gather_axis": 0, "quantize_axis": 2}
    looked_up = ir.node(GATHER_NBITS, [codes, ids, *tables], sizes, domain=CONTRIB)
    nodes = {f"{name}.blocks": looked_up}
    if format_.zero == "offset":
        rests = ir.node(
            "Gather", [table("row_rests", ir.DataType.FLOAT, lambda found: found.rests), ids]
        )
        nodes[f"{name}.row_rest"] = rests
        nodes[f"{name}.whole"] = ir.node("Add", [looked_up.outputs[0], rests.outputs[0]])
    nodes |= _joined(
        graph, name, list(nodes.values())[-1].outputs[0], blocks * format_.block, columns
    )
    for output, node in nodes.items():
        node.outputs[0].name = output
    graph.insert_before(gather, list(nodes.values()))
    take_place(gather, list(nodes.values())[-1].outputs[0])
    graph.remove(gather, safe=True)


def _joined(
    graph: ir.Graph, name: str, blocks: ir.Value, filled: int, columns: int
) -> dict[str, ir.Node]:
    """[B, S, blocks, block] as [B, S, columns], by the name of each node's output."""
    shape = new_constant(graph, "row", np.array([0, 0, -1], np.int64))
    nodes = {f"{name}.row": ir.node("Reshape", [blocks, shape])}
    if filled != columns:
        start, end, axis = (
            new_constant(graph, f"row.{kind}", np.array([number], np.int64))
            for kind, number in (("start", 0), ("width", columns), ("axis", 2))
        )
        row = nodes[f"{name}.row"].outputs[0]
        nodes[f"{name}.cut"] = ir.node("Slice", [row, start, end, axis])
    return nodes
