"""Nodes of codes and products of DequantizeLinear are the same numbers, whatever the width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from pipeline.engine.dequantized import _Dequantized, dequantize_nodes
from pipeline.export.block_skip import PLUGIN_ATTRIBUTES, function_bodies
from pipeline.export.contract import DOMAIN

OPSET = 21
SCALES = {"a": [2, 7], "b": [1, 9]}


def model_of(op_type: str, columns: dict[str, int]) -> onnx.ModelProto:
    """One node over x [rows, 39], a [32, 7] and b [7, 9] of codes; a in blocks, b by column."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, rows, stored in (("a", 32, columns["a"]), ("b", 7, columns["b"])):
        arrays[name] = random.integers(-128, 128, (rows, stored)).astype(np.int8)
        arrays[f"{name}_scale"] = random.uniform(0.1, 1, SCALES[name]).astype(np.float32)
    arrays["index"] = random.permutation(39).astype(np.int32)
    value = onnx.helper.make_tensor_value_info
    attributes: dict[str, Any] = PLUGIN_ATTRIBUTES | {"block_a": 16, "block_b": 16}
    node = onnx.helper.make_node(op_type, ["x", *arrays], ["y"], domain=DOMAIN, **attributes)
    graph = onnx.helper.make_graph(
        [node], "one", [value("x", 1, ["rows", 39])], [value("y", 1, ["rows", 9])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    body = ir.serde.serialize_function(function_bodies(OPSET, {op_type})[op_type])
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, functions=[body], opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto | str) -> np.ndarray:
    given = model if isinstance(model, str) else model.SerializeToString()
    x = np.random.default_rng(1).normal(size=(3, 39)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    # Otherwise ONNX Runtime rounds the inputs of a product with DequantizeLinear to 8 bits.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (y,) = onnxruntime.InferenceSession(given, options).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    ("op_type", "columns"),
    [
        ("BlockSkipLinearA4B8Indexed", {"a": 4, "b": 9}),
        ("BlockSkipLinearA4B4Indexed", {"a": 4, "b": 5}),
        ("BlockSkipLinearA8B8Indexed", {"a": 7, "b": 9}),
    ],
)
def test_a_rewritten_node_computes_the_same(
    op_type: str, columns: dict[str, int], external: bool, tmp_path: Path
) -> None:
    model = model_of(op_type, columns)
    expected = run(model)
    path = str(tmp_path / "model.onnx")
    onnx.save(model, path, save_as_external_data=external, location="weights", size_threshold=0)
    rewritten = onnx.load(path, load_external_data=False)
    assert dequantize_nodes(rewritten, tmp_path) == _Dequantized(2, 1)
    assert [node.op_type for node in rewritten.graph.node] == [
        "DequantizeLinear", "DequantizeLinear", "BlockSkipLinearFewBitsIndexed",
    ]  # fmt: skip
    assert [function.name for function in rewritten.functions] == ["BlockSkipLinearFewBitsIndexed"]
    Path(path).write_bytes(rewritten.SerializeToString())
    np.testing.assert_allclose(run(path), expected, rtol=1e-5, atol=1e-4)


def test_a_graph_without_codes_stays_as_it_is(tiny_export: Path) -> None:
    model = onnx.load(str(tiny_export / "model.onnx"), load_external_data=False)
    before = model.SerializeToString()
    assert dequantize_nodes(model, tiny_export) == _Dequantized(0, 0)
    assert model.SerializeToString() == before
