"""Small graphs as text, and a check that a pass leaves their outputs alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from pipeline.export.block_skip import DOMAIN, VERSION, function_bodies, is_block_skip

HEADER = '<ir_version: 10, opset_import: ["" : 24, "skipcat" : 1]>\n'


def graph(text: str, **weights: np.ndarray) -> ir.Model:
    """Parse a graph; `weights` become its initializers."""
    proto = onnx.parser.parse_model(HEADER + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.serde.deserialize_model(proto)


def torch_order(model: ir.Model) -> ir.Model:
    """The same model with block-skip weights as the op takes them: before `merge_shared`."""
    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for node in list(copy.graph):
        if is_block_skip(node):
            for number in (1, 2):
                turned = ir.node("Transpose", [node.inputs[number]], {"perm": [1, 0]})
                copy.graph.insert_before(node, turned)
                node.replace_input_with(number, turned.outputs[0])
    return copy


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of ONNX Runtime."""
    copy = ir.serde.deserialize_model(ir.serde.serialize_model(model))
    for body in function_bodies(24).values():
        copy.functions[body.identifier()] = body
    copy.opset_imports[DOMAIN] = VERSION
    proto = ir.serde.serialize_model(copy)
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)


def assert_same_outputs(
    model: ir.Model, apply: Callable[[ir.Model], Any], feed: dict[str, np.ndarray], *, merges: bool
) -> Any:
    """Run the graph, apply a pass, run it again, compare; return what the pass returned."""
    before = run(torch_order(model), feed)
    result = apply(model)
    after = run(model if merges else torch_order(model), feed)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    return result
