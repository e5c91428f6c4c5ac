"""Small graphs as text, and a check that a pass leaves their outputs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from pipeline.export.block_skip import function_bodies, is_block_skip
from pipeline.export.contract import BLOCK_SKIP_OPS, DOMAIN, OP_VERSION
from pipeline.export.passes.lay_out import TRACE_DOMAIN

HEADER = '<ir_version: 10, opset_import: ["" : 24, "skipcat" : 1, "skipcat.trace" : 1]>\n'


def graph(text: str, **weights: np.ndarray) -> ir.Model:
    """Parse a graph; `weights` become its initializers."""
    proto = onnx.parser.parse_model(HEADER + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.serde.deserialize_model(proto)


def runnable(model: ir.Model) -> ir.Model:
    """A traced model, whose weights are in torch's order, in a form that ONNX Runtime takes."""
    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for node in list(copy.graph):
        if is_block_skip(node):
            for number in (1, 2):
                transpose_input(copy.graph, node, number)
        elif node.domain == TRACE_DOMAIN:
            transpose_input(copy.graph, node, 1)
            node.domain, node.op_type = "", "MatMul"
    return copy


def transpose_input(graph_: ir.Graph, node: ir.Node, number: int) -> None:
    turned = ir.node("Transpose", [node.inputs[number]], {"perm": [1, 0]})
    graph_.insert_before(node, turned)
    node.replace_input_with(number, turned.outputs[0])


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of ONNX Runtime."""
    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for body in function_bodies(24, BLOCK_SKIP_OPS).values():
        copy.functions[body.identifier()] = body
    copy.opset_imports[DOMAIN] = OP_VERSION
    proto = ir.serde.serialize_model(copy)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)


def assert_same_outputs(
    model: ir.Model,
    apply: Callable[[ir.Model], Any],
    feed: dict[str, np.ndarray],
    *,
    lays_out: bool,
) -> Any:
    """Run the graph, apply a pass, run it again, compare; return what the pass returned."""
    before = run(runnable(model), feed)
    result = apply(model)
    after = run(model if lays_out else runnable(model), feed)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    return result
