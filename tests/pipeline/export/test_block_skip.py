"""The function body is the specification, and ONNX Runtime runs it as such."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from pipeline.export.block_skip import PLUGIN_ATTRIBUTES, function_bodies
from pipeline.export.contract import (
    BLOCK_SKIP,
    BLOCK_SKIP_INDEXED,
    BLOCK_SKIP_OPS,
    DEQUANTIZED_SKIP_OPS,
    DOMAIN,
    LINEAR_QUANTIZED,
    QUANTIZED_OPS,
)
from pipeline.quantize.kernel_codes import _two_to_a_byte
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
        functions=[ir.serde.serialize_function(function_bodies(opset, {op_type})[op_type])],
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


def test_the_ops_behind_dequantize_linear_have_the_bodies_of_numbers() -> None:
    bodies = function_bodies(24, {*BLOCK_SKIP_OPS, *DEQUANTIZED_SKIP_OPS})
    for few, plain in zip(DEQUANTIZED_SKIP_OPS, BLOCK_SKIP_OPS, strict=True):
        first, second = (ir.serde.serialize_function(bodies[name]) for name in (few, plain))
        first.name = second.name
        assert first == second


def test_bodies_that_no_node_asks_for_are_not_made() -> None:
    assert set(function_bodies(18, {BLOCK_SKIP, "Relu"})) == {BLOCK_SKIP}


N, RANK, M = 75, 33, 21  # of 4 bits, odd columns fill no byte
BLOCKS = {"a": 32, "b": 48}  # the last of a not whole, b in one


def coded_layer(op_type: str, dtype: type) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What an op reads beside x, and what DequantizeLinear makes of its codes, by name."""
    random = np.random.default_rng(1)
    held: dict[str, np.ndarray] = {}
    exact: dict[str, np.ndarray] = {}
    dense = op_type.startswith(LINEAR_QUANTIZED)
    for name, rows, columns in (("a", N - RANK, RANK), ("b", N if dense else RANK, M)):
        if dense and name == "a":
            continue
        form = (
            op_type[-1]
            if dense
            else op_type.removeprefix(BLOCK_SKIP).partition(name.upper())[2][:1]
        )
        if form not in ("4", "8"):
            held[name] = exact[name] = random.normal(size=(rows, columns)).astype(dtype)
            continue
        limit = 8 if form == "4" else 128
        codes = random.integers(-limit, limit, (rows, columns)).astype(np.int8)
        codes[0, :2] = -limit, limit - 1
        groups = -(-rows // BLOCKS[name])
        scales: np.ndarray = random.uniform(0.01, 0.1, (groups, columns)).astype(dtype)
        held[name] = _two_to_a_byte(codes) if form == "4" else codes
        held[f"{name}_scale"] = scales
        exact[name] = dequantized(codes, scales, BLOCKS[name])
    if op_type.endswith("Indexed"):
        held["index"] = random.permutation(N).astype(np.int32)
    return held, exact


def dequantized(codes: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """By ONNX Runtime's DequantizeLinear."""
    node = onnx.helper.make_node("DequantizeLinear", ["c", "s"], ["y"], axis=0, block_size=block)
    tensors = [onnx.numpy_helper.from_array(t, n) for t, n in ((codes, "c"), (scales, "s"))]
    kind = onnx.helper.np_dtype_to_tensor_dtype(scales.dtype)
    output = onnx.helper.make_tensor_value_info("y", kind, codes.shape)
    graph = onnx.helper.make_graph([node], "one", [], [output], tensors)
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})
    return np.asarray(y)


def run_coded(op_type: str, x: np.ndarray, held: dict[str, np.ndarray], opset: int) -> np.ndarray:
    """One node of an op of codes, which are constants, by its body."""
    blocks = {f"block_{name}": block for name, block in BLOCKS.items() if f"{name}_scale" in held}
    attributes: dict[str, Any] = PLUGIN_ATTRIBUTES | blocks
    node = onnx.helper.make_node(op_type, ["x", *held], ["y"], domain=DOMAIN, **attributes)
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    value = onnx.helper.make_tensor_value_info
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in held.items()]
    shape: list[str | int | None] = ["rows", M]
    graph = onnx.helper.make_graph(
        [node], "one", [value("x", kind, [*shape[:1], N])], [value("y", kind, shape)], tensors
    )
    model = onnx.helper.make_model(
        graph,
        functions=[ir.serde.serialize_function(function_bodies(opset, {op_type})[op_type])],
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("op_type", QUANTIZED_OPS)
def test_a_body_of_codes_computes_what_dequantize_linear_does(op_type: str) -> None:
    opset = 18 if len(op_type) % 2 else 24
    held, exact = coded_layer(op_type, np.float32)
    x = np.random.default_rng(2).normal(size=(3, N)).astype(np.float32)
    a = exact.get("a", np.zeros((0, N)))
    expected = block_skip_linear(x, a, exact["b"], held.get("index"))
    np.testing.assert_allclose(run_coded(op_type, x, held, opset), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("form", ["4", "8"])
def test_codes_become_the_very_numbers_of_dequantize_linear(form: str, dtype: type) -> None:
    """The identity times a matrix is the matrix, each number as it was rounded."""
    held, exact = coded_layer(LINEAR_QUANTIZED + form, dtype)
    y = run_coded(LINEAR_QUANTIZED + form, np.eye(N, dtype=dtype), held, 18)
    np.testing.assert_array_equal(y, exact["b"])
    assert y.dtype == dtype


def test_half_bytes_of_even_columns_are_the_bytes_of_int4() -> None:
    codes = np.random.default_rng(3).integers(-8, 8, (5, 6)).astype(np.int8)
    tensor = ir.tensor(codes.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)
    assert tensor.tobytes() == _two_to_a_byte(codes).tobytes()
