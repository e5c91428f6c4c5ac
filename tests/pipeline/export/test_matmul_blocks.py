"""The operators of products with codes: names, inputs and bodies, against the kernels."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from pipeline.export.contract import (
    BLOCK_SKIP_BLOCKS_OPS,
    CPU_KERNEL_OPS,
    LOOK_UP_BLOCKS_OPS,
    MATMUL_BLOCKS_OPS,
)
from pipeline.export.matmul_blocks import function_bodies
from pipeline.kernels.cpu_library import cpu_library, why_no_kernels
from tests.support.block_products import (
    look_up_graph,
    node_graph,
    random_matrix,
    session_of,
    skip_graph,
)

ZEROS = ("sym", "asym", "offset")


def graphs() -> dict[str, bytes]:
    """A graph of one node of every operator."""
    made = {}
    for zero, bias in itertools.product(ZEROS, (False, True)):
        vector = np.ones(20, np.float32) if bias else None
        graph = node_graph(random_matrix(20, 48, 4, 16, zero), vector)
        made[MATMUL_BLOCKS_OPS[zero, bias]] = graph
    for a, b, indexed in itertools.product(ZEROS, ZEROS, (False, True)):
        index = np.arange(48, dtype=np.int32)[::-1].copy() if indexed else None
        factors = random_matrix(16, 32, 8, 16, a), random_matrix(20, 16, 2, 16, b)
        made[BLOCK_SKIP_BLOCKS_OPS[a, b, indexed]] = skip_graph(*factors, index)
    for zero, name in LOOK_UP_BLOCKS_OPS.items():
        made[name] = look_up_graph(random_matrix(20, 48, 4, 16, zero), head=False)
    return made


def test_every_operator_has_a_body_and_the_inputs_that_it_alone_reads_are_known() -> None:
    bodies = function_bodies(23, CPU_KERNEL_OPS)
    assert set(bodies) == set(CPU_KERNEL_OPS) == set(graphs())
    for name, places in CPU_KERNEL_OPS.items():
        inputs = [value.name or "" for value in bodies[name].inputs]
        assert [n for n, text in enumerate(inputs) if text.endswith("ones")] == list(places)


@pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))
@pytest.mark.parametrize("name", sorted(CPU_KERNEL_OPS))
def test_every_operator_has_a_kernel_that_runs_without_a_body(name: str) -> None:
    model = onnx.load_model_from_string(graphs()[name])
    x: dict[str, np.ndarray] = {"ids": np.array([[3, 0, 19]])}
    if name not in LOOK_UP_BLOCKS_OPS.values():
        x = {"x": np.random.default_rng(0).standard_normal((1, 3, 48)).astype(np.float32)}
    expected = session_of(model.SerializeToString(), cpu_library()).run(None, x)[0]
    del model.functions[:]
    alone = model.SerializeToString()
    with pytest.raises(Exception, match=name):
        session_of(alone, None)
    assert np.array_equal(session_of(alone, cpu_library()).run(None, x)[0], expected)
