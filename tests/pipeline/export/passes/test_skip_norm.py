"""A norm behind a sum is one node with it; any other keeps its form, and the log says why."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from pipeline.export.passes.lay_out import lay_out
from pipeline.export.passes.skip_norm import SKIP_NORM, fuse_residual_norms
from tests.support.graphs import graph, run

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)}
GAIN = np.random.default_rng(1).standard_normal(8).astype(np.float32)
NORM = "n = RMSNormalization <axis = -1, epsilon = 1e-6> (s, gain) y = Tanh(n)"


def test_a_sum_and_its_norm_become_one_node_with_the_same_numbers() -> None:
    text = (
        "f (float[2, 3, 8] x) => (float[2, 3, 8] y, float[2, 3, 8] z) "
        "<float[2, 3, 8] h, float[2, 3, 8] s, float[2, 3, 8] n> "
        f"{{ h = Sigmoid(x) s = Add(x, h) {NORM} z = Neg(s) }}"
    )
    model = graph(text, gain=GAIN)
    before = run(graph(text, gain=GAIN), X)
    assert fuse_residual_norms(model) == 1
    lay_out(model)  # takes what no node reads any more
    kinds = {node.op_type for node in model.graph}
    assert kinds == {"Sigmoid", "Tanh", "Neg", SKIP_NORM}
    model.opset_imports["com.microsoft"] = 1
    for new, old in zip(run(model, X), before, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sum_", "reason"),
    [("s = Sigmoid(x)", "its input is no sum"), ("s = Add(x, one)", "its sum broadcasts")],
)
def test_a_norm_that_stays_says_why(
    sum_: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = (
        "f (float[2, 3, 8] x) => (float[2, 3, 8] y) "
        "<float[2, 3, 8] s, float[2, 3, 8] n> "
        f"{{ one = Constant <value = float {{1.0}}> () {sum_} {NORM} }}"
    )
    with caplog.at_level(logging.DEBUG, "pipeline.export.passes"):
        assert fuse_residual_norms(graph(text, gain=GAIN)) == 0
    assert reason in caplog.text
