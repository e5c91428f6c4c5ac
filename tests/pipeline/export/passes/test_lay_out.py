"""Merging nodes that share their latent leaves the outputs alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from pipeline.export.block_skip import PLUGIN_ATTRIBUTES, is_block_skip
from pipeline.export.passes.lay_out import lay_out
from tests.support.graphs import assert_same_outputs, graph

RANDOM = np.random.default_rng(0)
X = {"x": RANDOM.normal(size=(2, 6)).astype(np.float32)}
WEIGHTS = {
    "l.q_proj.down.weight": RANDOM.normal(size=(4, 2)).astype(np.float32),
    "l.q_proj.up.weight": RANDOM.normal(size=(5, 4)).astype(np.float32),
    "l.k_proj.up.weight": RANDOM.normal(size=(3, 4)).astype(np.float32),
    "other": RANDOM.normal(size=(4, 2)).astype(np.float32),
    "p": RANDOM.permutation(6).astype(np.int32),
}
CALL = "skipcat.BlockSkipLinearIndexed"


def model_of(body: str) -> ir.Model:
    """Build a model: the text form takes no dots in names, so they are put in afterwards."""
    renamed = {name.replace(".", "_"): array for name, array in WEIGHTS.items()}
    model = graph(f"f (float[B, 6] x) => (float[B, 5] q, float[B, 3] k) {{ {body} }}", **renamed)
    for name in WEIGHTS:
        value = model.graph.initializers.pop(name.replace(".", "_"))
        value.name = name
        model.graph.initializers[name] = value
    return model


SHARED = (
    f"q = {CALL}(x, l_q_proj_down_weight, l_q_proj_up_weight, p) "
    f"k = {CALL}(x, l_q_proj_down_weight, l_k_proj_up_weight, p)"
)
SEPARATE = SHARED.replace("x, l_q_proj_down_weight, l_k", "x, other, l_k")


def test_nodes_with_the_same_input_and_latent_become_one() -> None:
    model = model_of(SHARED)
    assert assert_same_outputs(model, lay_out, X, lays_out=True) == 1
    (node,) = [node for node in model.graph if is_block_skip(node)]
    assert node.name == "l.q_proj+k_proj"
    assert [value.const_value.shape.numpy() for value in node.inputs[1:3]] == [(2, 4), (4, 8)]


def test_nodes_with_different_latents_stay_apart() -> None:
    assert assert_same_outputs(model_of(SEPARATE), lay_out, X, lays_out=True) == 2


def test_a_linear_becomes_a_product_with_its_transposed_weight() -> None:
    weight = RANDOM.normal(size=(5, 6)).astype(np.float32)
    model = graph(
        "f (float[B, 6] x) => (float[B, 5] y) { y = skipcat.trace.Linear(x, w) }", w=weight
    )
    assert assert_same_outputs(model, lay_out, X, lays_out=True) == 0
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert list(model.graph.initializers) == ["w.T"]


def test_a_weight_that_something_else_reads_is_stored_once() -> None:
    weight = RANDOM.normal(size=(5, 6)).astype(np.float32)
    model = graph(
        "f (float[B, 6] x, int64[B] ids) => (float[B, 5] y, float[B, 6] e) "
        "{ y = skipcat.trace.Linear(x, w) e = Gather(w, ids) }",
        w=weight,
    )
    assert_same_outputs(model, lay_out, X | {"ids": np.array([4, 0])}, lays_out=True)
    assert list(model.graph.initializers) == ["w"]


def test_every_node_names_its_plugin() -> None:
    model = model_of(SEPARATE)
    lay_out(model)
    for node in model.graph:
        if is_block_skip(node):
            attributes = {name: value.as_string() for name, value in node.attributes.items()}
            assert attributes == PLUGIN_ATTRIBUTES


def test_replaced_weights_leave_the_graph() -> None:
    model = model_of(SHARED)
    lay_out(model)
    assert set(model.graph.initializers) == {
        "l.q_proj+k_proj.a",
        "l.q_proj+k_proj.b",
        "l.q_proj+k_proj.heights",
        "p",
    }
