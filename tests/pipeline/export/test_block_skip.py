"""The function body is the specification, and ONNX Runtime runs it as such."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from pipeline.export.block_skip import PLUGIN_ATTRIBUTES, function_bodies
from pipeline.export.contract import (
    BLOCK_SKIP,
    BLOCK_SKIP_INDEXED,
    DOMAIN,
    QUANTIZED_SKIP,
    QUANTIZED_SKIP_INDEXED,
)
from trt_plugins.block_skip.reference import block_skip_linear


def one_node_model(
    op_type: str, columns: int, rank: int, rows: int, opset: int, dtype: type
) -> onnx.ModelProto:
    """x, a, b (and index) as inputs of a single node, with its body in the model."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = onnx.helper.make_tensor_value_info
    inputs = [
        value("x", kind, ["batch", "length", columns]),
        value("a", kind, [columns - rank, rank]),
        value("b", kind, [rank, rows]),
    ]
    if op_type == BLOCK_SKIP_INDEXED:
        inputs.append(value("index", onnx.TensorProto.INT32, [columns]))
    names = [entry.name for entry in inputs]
    node = onnx.helper.make_node(op_type, names, ["y"], domain=DOMAIN, **PLUGIN_ATTRIBUTES)
    outputs = [value("y", kind, ["batch", "length", rows])]
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", inputs, outputs),
        functions=[ir.serde.serialize_function(function_bodies(opset)[op_type])],
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            onnx.helper.make_opsetid(DOMAIN, 1),
        ],
        ir_version=10,
    )


@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("op_type", [BLOCK_SKIP, BLOCK_SKIP_INDEXED])
@pytest.mark.parametrize(
    ("columns", "rank", "rows"), [(16, 8, 24), (17, 5, 3), (9, 8, 1), (5, 1, 7)]
)
def test_body_equals_the_reference(
    op_type: str, opset: int, columns: int, rank: int, rows: int
) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 3, columns)).astype(np.float32)
    a = random.uniform(-2, 2, size=(columns - rank, rank)).astype(np.float32)
    b = random.normal(size=(rank, rows)).astype(np.float32)
    index = random.permutation(columns).astype(np.int32)
    model = one_node_model(op_type, columns, rank, rows, opset, np.float32)
    onnx.checker.check_model(model, full_check=True)
    feed = {"x": x, "a": a, "b": b} | ({"index": index} if op_type == BLOCK_SKIP_INDEXED else {})
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, feed)
    expected = block_skip_linear(x, a, b, index if op_type == BLOCK_SKIP_INDEXED else None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_the_node_carries_what_tensorrt_looks_for() -> None:
    assert PLUGIN_ATTRIBUTES == {"plugin_namespace": "skipcat", "plugin_version": "1"}


def test_without_a_body_onnx_runtime_refuses_the_node() -> None:
    model = one_node_model(BLOCK_SKIP, 8, 4, 4, 24, np.float32)
    del model.functions[:]
    with pytest.raises(Exception, match="not a registered function"):
        onnxruntime.InferenceSession(model.SerializeToString())


def test_the_ops_of_few_bits_have_the_same_bodies_from_the_opset_that_has_blocks() -> None:
    bodies = function_bodies(24)
    for few, plain in ((QUANTIZED_SKIP, BLOCK_SKIP), (QUANTIZED_SKIP_INDEXED, BLOCK_SKIP_INDEXED)):
        first, second = (ir.serde.serialize_function(bodies[name]) for name in (few, plain))
        first.name = second.name
        assert first == second
    assert set(function_bodies(18)) == {BLOCK_SKIP, BLOCK_SKIP_INDEXED}
