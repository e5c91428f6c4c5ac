"""Folding a permutation leaves the outputs alone, and happens only where the algebra holds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.export.contract import BLOCK_SKIP, BLOCK_SKIP_INDEXED
from pipeline.export.passes.fold_permutation import fold_permutations
from tests.support.graphs import assert_same_outputs, graph

RANDOM = np.random.default_rng(0)
X = {"x": RANDOM.normal(size=(2, 6)).astype(np.float32)}
# A gated MLP of width 6 -> 8 -> 6; its down projection has rank 3.
DOWN = {
    "a": RANDOM.normal(size=(3, 5)).astype(np.float32),
    "b": RANDOM.normal(size=(6, 3)).astype(np.float32),
    "p": RANDOM.permutation(8).astype(np.int32),
}
DENSE = {
    "wg": RANDOM.normal(size=(8, 6)).astype(np.float32),
    "wu": RANDOM.normal(size=(8, 6)).astype(np.float32),
}
FACTORED = {
    "ga": RANDOM.normal(size=(2, 4)).astype(np.float32),
    "gb": RANDOM.normal(size=(8, 2)).astype(np.float32),
    "ub": RANDOM.normal(size=(8, 2)).astype(np.float32),
    "gp": RANDOM.permutation(6).astype(np.int32),
}
CALL = "skipcat.BlockSkipLinearIndexed"
LINEAR = "skipcat.trace.Linear"


def op_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == "skipcat"]


def test_folds_into_the_dense_matrices_of_a_gated_mlp() -> None:
    model = graph(
        f"f (float[B, 6] x) => (float[B, 6] y) {{ g = {LINEAR}(x, wg) s = Sigmoid(g) h = Mul(g, s) "
        f"u = {LINEAR}(x, wu) m = Mul(h, u) y = {CALL}(m, a, b, p) }}",
        **DENSE,
        **DOWN,
    )
    folded, kept = assert_same_outputs(model, fold_permutations, X, lays_out=False)
    assert (folded, kept) == (1, [])
    assert op_types(model) == [BLOCK_SKIP]


def test_folds_into_the_block_skip_nodes_of_a_gated_mlp() -> None:
    model = graph(
        f"f (float[B, 6] x) => (float[B, 6] y) {{ g = {CALL}(x, ga, gb, gp) h = Gelu(g) "
        f"u = {CALL}(x, ga, ub, gp) m = Mul(h, u) y = {CALL}(m, a, b, p) }}",
        **FACTORED,
        **DOWN,
    )
    folded, kept = assert_same_outputs(model, fold_permutations, X, lays_out=False)
    assert folded == 1
    assert len(kept) == 2
    assert op_types(model) == [BLOCK_SKIP_INDEXED, BLOCK_SKIP_INDEXED, BLOCK_SKIP]


def test_biases_are_permuted_with_the_rows_they_belong_to() -> None:
    model = graph(
        f"f (float[B, 6] x) => (float[B, 6] y) {{ g = {LINEAR}(x, wg) c = Add(g, bias) r = Relu(c) "
        f"t = Mul(r, two) y = {CALL}(t, a, b, p) }}",
        wg=DENSE["wg"],
        bias=RANDOM.normal(size=8).astype(np.float32),
        two=np.array(2.0, dtype=np.float32),
        **DOWN,
    )
    folded, _ = assert_same_outputs(model, fold_permutations, X, lays_out=False)
    assert folded == 1


def test_a_weight_that_something_else_reads_is_not_changed_for_it() -> None:
    model = graph(
        "f (float[B, 6] x) => (float[B, 6] y, float[B, 8] z) { g = skipcat.trace.Linear(x, wg) "
        f"y = {CALL}(g, a, b, p) z = skipcat.trace.Linear(x, wg) }}",
        wg=DENSE["wg"],
        **DOWN,
    )
    folded, _ = assert_same_outputs(model, fold_permutations, X, lays_out=False)
    assert folded == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"g = skipcat.trace.Linear(x, wg) y = {CALL}(g, a, b, p) z = Relu(g)", "read by Relu"),
        (f"z = skipcat.trace.Linear(x, wg) y = {CALL}(z, a, b, p)", "output of the graph"),
        (
            f"z = skipcat.trace.Linear(x, wg) g = Softmax(z) y = {CALL}(g, a, b, p)",
            "Softmax is not elementwise",
        ),
    ],
)
def test_keeps_the_index_where_folding_would_be_wrong(body: str, reason: str) -> None:
    model = graph(
        f"f (float[B, 6] x) => (float[B, 6] y, float[B, 8] z) {{ {body} }}",
        wg=DENSE["wg"],
        **DOWN,
    )
    folded, kept = assert_same_outputs(model, fold_permutations, X, lays_out=False)
    assert folded == 0
    assert reason in kept[0]
    assert op_types(model) == [BLOCK_SKIP_INDEXED]


def test_an_input_of_the_graph_keeps_its_order() -> None:
    model = graph(f"f (float[B, 8] x) => (float[B, 6] y) {{ y = {CALL}(x, a, b, p) }}", **DOWN)
    feed = {"x": RANDOM.normal(size=(2, 8)).astype(np.float32)}
    _, kept = assert_same_outputs(model, fold_permutations, feed, lays_out=False)
    assert "input of the graph" in kept[0]
