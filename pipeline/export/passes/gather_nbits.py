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
) -> str:
    """Let codes take the place of the weight that a Gather reads.

    Args:
        graph: changed in place.
        gather: the look-up; its output is [B, S, columns].
        codes: [rows, blocks, bytes].
        format_: of the codes.
        read: the codes with their scales and zero points, when they are written.
        kernel: take the operator of ours, if it has the format.

    Returns:
        The operator that looks up.
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

    inputs = [codes, ids, table("row_scales", ir.DataType.FLOAT, lambda found: found.scales)]
    if format_.zero == "asym":  # here one to a byte
        inputs.append(table("row_zeros", ir.DataType.UINT8, lambda found: found.zero_points))
    if kernel and format_.zero in LOOK_UP_BLOCKS_OPS:
        nodes = _own(name, rows, columns, format_, inputs)
    else:
        rests = None
        if format_.zero == "offset":
            rests = table("row_rests", ir.DataType.FLOAT, lambda found: found.rests)
        nodes = _stock(graph, name, columns, format_, inputs, rests)
    for output, node in nodes.items():
        node.outputs[0].name = output
    graph.insert_before(gather, list(nodes.values()))
    take_place(gather, list(nodes.values())[-1].outputs[0])
    graph.remove(gather, safe=True)
    return next(iter(nodes.values())).op_type


def _own(
    name: str, rows: int, columns: int, format_: Format, inputs: list[ir.Value]
) -> dict[str, ir.Node]:
    """The operator of ours, by the name of its output."""
    codes, ids, *tables = inputs
    sizes = {"K": columns, "N": rows, "bits": format_.bits, "block_size": format_.block}
    node = ir.node(
        LOOK_UP_BLOCKS_OPS[format_.zero],
        [ids, codes, *tables],
        sizes,
        domain=DOMAIN,
        version=OP_VERSION,
        name=f"{name}.rows",
    )
    return {f"{name}.row": node}


def _stock(
    graph: ir.Graph,
    name: str,
    columns: int,
    format_: Format,
    inputs: list[ir.Value],
    rests: ir.Value | None,
) -> dict[str, ir.Node]:
    """ONNX Runtime's operator, what rests add, and whole rows, by the names of their outputs."""
    sizes = {
        "bits": format_.bits,
        "block_size": format_.block,
        "gather_axis": 0,
        "quantize_axis": 2,
    }
    looked_up = ir.node(GATHER_NBITS, inputs, sizes, domain=CONTRIB)
    nodes = {f"{name}.blocks": looked_up}
    if rests is not None:
        own = ir.node("Gather", [rests, inputs[1]])
        nodes[f"{name}.row_rest"] = own
        nodes[f"{name}.whole"] = ir.node("Add", [looked_up.outputs[0], own.outputs[0]])
    filled = format_.blocks(columns) * format_.block
    return nodes | _joined(graph, name, list(nodes.values())[-1].outputs[0], filled, columns)


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
