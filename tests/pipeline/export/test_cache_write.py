"""Writing into a cache of fixed length where the opset has no TensorScatter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.export.cache_write import function_bodies
from pipeline.export.contract import CACHE_WRITE, DOMAIN, GRAPH_FILE, PROFILES
from pipeline.export.record import read_export_record
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.tiny_decoder import MAX_LENGTH, shared_export

STATIC = "compat-static"
TYPES = {np.float16: TensorProto.FLOAT16, np.float32: TensorProto.FLOAT, np.int8: TensorProto.INT8}


def run_body(past: np.ndarray, new: np.ndarray, first: np.ndarray) -> np.ndarray:
    """One node, computed by its function body in ONNX Runtime."""
    opset, kind = PROFILES[STATIC].opset, TYPES[past.dtype.type]
    cache = [helper.make_tensor_value_info(n, kind, [None] * 4) for n in ("past", "new", "present")]
    node = helper.make_node(CACHE_WRITE, ["past", "new", "first"], ["present"], domain=DOMAIN)
    places = helper.make_tensor_value_info("first", TensorProto.INT32, [None])
    graph = helper.make_graph([node], "one", [*cache[:2], places], cache[2:])
    body = function_bodies(opset, {CACHE_WRITE})[CACHE_WRITE]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    functions = [ir.serde.serialize_function(body)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(None, {"past": past, "new": new, "first": first})[0]
    return found


@pytest.mark.parametrize("dtype", TYPES)
def test_new_tokens_stand_in_their_slots_and_all_else_as_before(dtype: Any) -> None:
    random = np.random.default_rng(0)
    past, new = (random.integers(-99, 99, (3, 2, tokens, 5)).astype(dtype) for tokens in (11, 4))
    first = np.array([0, 7, 3], np.int32)
    expected = past.copy()
    for row, start in enumerate(first):
        expected[row, :, start : start + 4] = new[row]
    np.testing.assert_array_equal(run_body(past, new, first), expected)


def test_no_other_op_asks_for_the_body() -> None:
    assert function_bodies(18, {"BlockSkipLinear"}) == {}


def test_an_export_writes_every_cache_and_has_the_logits_of_one_that_grows() -> None:
    folder = shared_export(STATIC)
    model = onnx.load(folder / GRAPH_FILE, load_external_data=False)
    written = [node for node in model.graph.node if node.op_type == CACHE_WRITE]
    record = read_export_record(folder)
    assert len(written) == 2 * record.num_layers
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            assert value.type.tensor_type.shape.dim[2].dim_value == MAX_LENGTH
    sessions = [OnnxSession(shared_export(profile)) for profile in (STATIC, "compat")]
    for ids in ([[1, 2, 3, 4, 5]], [[6]], [[7, 8]]):
        static, growing = (session.forward(np.array(ids)) for session in sessions)
        # Places that a mask closes have the weight 0, and a sum does not mind how many there are.
        np.testing.assert_allclose(static, growing, atol=1e-5)
    for session in sessions:
        session.rewind(2)
    static, growing = (session.forward(np.array([[9, 9]])) for session in sessions)
    np.testing.assert_allclose(static, growing, atol=1e-5)


def test_the_weights_are_those_of_the_export_that_grows() -> None:
    initializers = []
    for profile in (STATIC, "compat"):
        model = onnx.load(shared_export(profile) / GRAPH_FILE)
        initializers.append({w.name: numpy_helper.to_array(w) for w in model.graph.initializer})
    common = initializers[0].keys() & initializers[1].keys()
    assert {name for name in common if name.endswith("weight")}
    for name in common:
        np.testing.assert_array_equal(initializers[0][name], initializers[1][name])
