"""Primitives to single operators; a norm's input and gain end up in one type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from pipeline.export.passes.fuse import fuse_operators
from tests.support.graphs import graph, run


def _norm(dtype: str, gain: str) -> ir.Model:
    """A norm in float32 of an input in `dtype`, whose gain is applied in the gain's type."""
    kinds = {"float": 1, "float16": 10}
    return graph(
        f"""
        norm ({dtype}[2, 8] x, {gain}[8] w) => (float[2, 8] y)
        <int64[1] axes = {{-1}}, float two = {{2.0}}, float eps = {{0.001}}>
        {{
            wide = Cast<to = 1>(x)
            square = Pow(wide, two)
            mean = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(square, axes)
            shifted = Add(mean, eps)
            root = Sqrt(shifted)
            inverse = Reciprocal(root)
            normed = Mul(wide, inverse)
            narrow = Cast<to = {kinds[gain]}>(normed)
            scaled = Mul(narrow, w)
            y = Cast<to = 1>(scaled)
        }}
        """
    )


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("gain", ["float", "float16"])
def test_a_norm_of_any_two_types_is_fused_and_valid(dtype: str, gain: str) -> None:
    numpy_types = {"float": np.float32, "float16": np.float16}
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 8)).astype(numpy_types[dtype])
    w = generator.normal(size=8).astype(numpy_types[gain])
    model = _norm(dtype, gain)
    expected = run(model, {"x": x, "w": w})[0]
    fuse_operators(model)
    norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
    assert len(norms) == 1
    assert len({value.dtype for value in norms[0].inputs}) == 1
    # The gain is applied before rounding to float16 instead of after.
    np.testing.assert_allclose(run(model, {"x": x, "w": w})[0], expected, rtol=3e-3, atol=1e-6)
