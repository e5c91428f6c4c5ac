"""What offsets of blocks add to a product: sums over the blocks, times one number for each.

    W x = MatMulNBits(x, Q) + rest s,  s the sums of x over the blocks

Sums and their product stay in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.export.passes.weights import new_constant


class BlockSums:
    """Sums of inputs over blocks of neighbours, computed once however many products read them."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._sums: dict[tuple[ir.Value, int], ir.Value] = {}
        self._ones: dict[tuple[int, int], ir.Value] = {}

    def __call__(self, x: ir.Value, columns: int, block: int) -> ir.Value:
        """Sums [..., blocks] of x [..., columns], the last block being what is left."""
        key = (x, block)
        if key not in self._sums:
            name = f"{x.name}.sums.{block}"
            node = ir.node("MatMul", [x, self.block_ones(columns, block)], name=name)
            node.outputs[0].name = name
            producer = x.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._sums[key] = node.outputs[0]
        return self._sums[key]

    def block_ones(self, columns: int, block: int) -> ir.Value:
        """A constant [columns, blocks], 1 where a column is in a block."""
        key = (columns, block)
        if key not in self._ones:
            blocks = -(-columns // block)
            ones = np.repeat(np.eye(blocks, dtype=np.float32), block, axis=0)[:columns]
            self._ones[key] = new_constant(self._graph, f"blocks.{columns}.{block}", ones)
        return self._ones[key]


def add_rests(
    graph: ir.Graph, before: ir.Node, product: ir.Value, sums: ir.Value, rests: ir.Value
) -> ir.Value:
    """Add what a product lacks, sums rests, in nodes inserted before one.

    Args:
        graph: changed in place.
        before: the node to insert before.
        product: [..., m].
        sums: [..., blocks].
        rests: a weight [blocks, m].

    Returns:
        [..., m].
    """
    name = f"{product.name}.rest"
    rest = ir.node("MatMul", [sums, rests], name=name)
    whole = ir.node("Add", [product, rest.outputs[0]], name=f"{product.name}.whole")
    rest.outputs[0].name, whole.outputs[0].name = name, whole.name
    graph.insert_before(before, [rest, whole])
    return whole.outputs[0]
