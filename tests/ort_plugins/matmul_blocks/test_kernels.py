"""The kernels, in ONNX Runtime, against the reference and the bodies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ort_plugins.matmul_blocks.reference import (
    Matrix,
    block_skip_blocks,
    look_up_blocks,
    matmul_blocks,
)
from pipeline.kernels.cpu_library import cpu_library, why_no_kernels
from pipeline.machine import cpu_flags
from tests.support.block_products import (
    look_up_graph,
    node_graph,
    random_matrix,
    session_of,
    skip_graph,
)

pytestmark = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))

# Rows, columns, bits, block and what codes are counted from: whole and broken groups and blocks.
SHAPES = [
    (64, 96, 4, 32, "offset"),
    (57, 100, 4, 32, "offset"),
    (33, 96, 4, 16, "sym"),
    (50, 90, 4, 64, "asym"),
    (48, 64, 8, 16, "sym"),
    (31, 200, 8, 64, "sym"),
    (20, 300, 8, 256, "asym"),
    (40, 80, 2, 32, "asym"),
    (17, 128, 2, 64, "sym"),
    (1, 16, 8, 16, "offset"),
]
ROWS = (1, 2, 3, 5, 7, 12, 29)


def inputs(rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((1, rows, columns)).astype(np.float32)
    x[0, :, ::13] *= 30  # as activations have them
    return x


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("halves", [True, False], ids=["float16 scales", "float32 scales"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_kernels_compute_what_the_reference_computes(
    shape: tuple[int, int, int, int, str], halves: bool
) -> None:
    matrix = random_matrix(*shape, halves=halves)
    bias = np.random.default_rng(1).standard_normal(shape[0]).astype(np.float32)
    for vector in (None, bias):
        session = session_of(node_graph(matrix, vector), cpu_library())
        for rows in ROWS:
            x = inputs(rows, shape[1])
            close(session.run(None, {"x": x})[0], matmul_blocks(x, matrix, vector))


# MatMulNBits rounds no input with 2 bits counted from the middle, nor with blocks it has no kernel
# for, so that it is nearer to the numbers than to us.
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_the_body_computes_what_the_reference_computes(
    shape: tuple[int, int, int, int, str],
) -> None:
    matrix = random_matrix(*shape)
    bias = np.random.default_rng(1).standard_normal(shape[0]).astype(np.float32)
    for vector in (None, bias):
        x = inputs(5, shape[1])
        found = session_of(node_graph(matrix, vector), None).run(None, {"x": x})[0]
        close(found, matmul_blocks(x, matrix, vector), 0.02)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_no_bit_of_a_row_depends_on_the_rows_beside_it_nor_on_threads(
    shape: tuple[int, int, int, int, str],
) -> None:
    graph = node_graph(random_matrix(*shape))
    x = inputs(29, shape[1])
    one, two = (session_of(graph, cpu_library(), threads) for threads in (1, 2))
    together = one.run(None, {"x": x})[0]
    assert np.array_equal(two.run(None, {"x": x})[0], together)
    for first, last in ((0, 1), (3, 5), (7, 20), (28, 29)):
        assert np.array_equal(one.run(None, {"x": x[:, first:last]})[0], together[:, first:last])


def test_many_rows_of_a_wide_matrix_are_shared_by_threads_without_a_changed_bit() -> None:
    matrix = random_matrix(1000, 576, 4, 32, "offset")
    graph = node_graph(matrix)
    x = inputs(40, 576)
    one, two = (
        session_of(graph, cpu_library(), threads).run(None, {"x": x})[0] for threads in (1, 2)
    )
    assert np.array_equal(one, two)
    close(one, matmul_blocks(x, matrix))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 64, 128]),
    st.sampled_from(["sym", "asym", "offset"]),
    st.integers(1, 14),
)
def test_any_shape_is_computed(
    rows: int, columns: int, bits: int, block: int, zero: str, tokens: int
) -> None:
    matrix = random_matrix(rows, columns, bits, block, zero)
    x = inputs(tokens, columns)
    found = session_of(node_graph(matrix), cpu_library()).run(None, {"x": x})[0]
    close(found, matmul_blocks(x, matrix))


# Of A [rank, rest] and B [N, rank]: bits, block and what codes are counted from.
FACTORS = [
    (24, 40, 50, (4, 32, "offset"), (4, 32, "offset")),
    (32, 64, 96, (4, 64, "asym"), (8, 16, "sym")),
    (17, 33, 20, (8, 32, "sym"), (2, 32, "asym")),
    (144, 432, 600, (2, 64, "asym"), (4, 32, "offset")),
]


def factors(case: tuple[int, int, int, tuple[int, int, str], tuple[int, int, str]]) -> Any:
    rank, rest, rows, of_a, of_b = case
    index = np.random.default_rng(rank).permutation(rank + rest).astype(np.int32)
    return random_matrix(rank, rest, *of_a), random_matrix(rows, rank, *of_b), index


@pytest.mark.parametrize("case", FACTORS, ids=lambda case: "-".join(map(str, case[:3])))
@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "body"])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "in order"])
def test_two_factors_are_one_node(case: Any, kernels: bool, indexed: bool) -> None:
    a, b, index = factors(case)
    index = index if indexed else None
    session = session_of(skip_graph(a, b, index), cpu_library() if kernels else None)
    for rows in ROWS:
        x = inputs(rows, case[0] + case[1])
        # A latent that lies between two codes of 8 bits may fall to either.
        found = session.run(None, {"x": x})[0]
        close(found, block_skip_blocks(x, a, b, index), 2e-3)
        assert (
            np.median(np.abs(found - block_skip_blocks(x, a, b, index)))
            < 2e-6 * np.abs(found).max()
        )


@pytest.mark.parametrize("case", FACTORS, ids=lambda case: "-".join(map(str, case[:3])))
def test_no_bit_of_a_row_of_two_factors_depends_on_the_rows_beside_it(case: Any) -> None:
    a, b, index = factors(case)
    x = inputs(29, case[0] + case[1])
    one, two = (session_of(skip_graph(a, b, index), cpu_library(), n) for n in (1, 2))
    together = one.run(None, {"x": x})[0]
    assert np.array_equal(two.run(None, {"x": x})[0], together)
    for first, last in ((0, 1), (3, 5), (7, 20), (28, 29)):
        assert np.array_equal(one.run(None, {"x": x[:, first:last]})[0], together[:, first:last])


@pytest.mark.parametrize("place", [-1, 64])
def test_an_index_outside_of_x_is_refused(place: int) -> None:
    a, b, index = factors(FACTORS[0])
    index[3] = place
    with pytest.raises(Exception, match="outside of x"):
        session_of(skip_graph(a, b, index), cpu_library())


TABLES = [(40, 96, 8, 32, "sym"), (33, 90, 4, 64, "asym"), (50, 64, 2, 16, "sym")]


@pytest.mark.parametrize("head", [True, False], ids=["of the head", "alone"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernel", "body"])
@pytest.mark.parametrize("shape", TABLES, ids=lambda shape: "-".join(map(str, shape)))
def test_rows_are_looked_up(shape: Any, kernels: bool, head: bool) -> None:
    matrix = random_matrix(*shape)
    session = session_of(look_up_graph(matrix, head), cpu_library() if kernels else None)
    ids = np.array([[0, 5, shape[0] - 1, 5], [7, 7, 1, 2]])
    found = session.run(["rows"], {"ids": ids})[0]
    assert np.array_equal(found, look_up_blocks(ids, matrix))


def test_rows_are_looked_up_in_the_head_of_their_own_session() -> None:
    one, two = (random_matrix(40, 96, 8, 32, "sym", halves) for halves in (True, False))
    sessions = [session_of(look_up_graph(m, head=True), cpu_library()) for m in (one, two)]
    ids = np.array([[3, 39]])
    for session, matrix in zip(sessions, (one, two), strict=True):
        found = session.run(["rows"], {"ids": ids})[0]
        assert np.array_equal(found, look_up_blocks(ids, matrix))


@pytest.mark.parametrize("wrong", [-41, 40])
def test_an_id_outside_of_the_table_is_refused(wrong: int) -> None:
    session = session_of(look_up_graph(random_matrix(*TABLES[0]), head=True), cpu_library())
    with pytest.raises(Exception, match="outside of the table"):
        session.run(["rows"], {"ids": np.array([[0, wrong]])})


def test_rows_of_zeros_give_zeros_and_no_rows_give_none() -> None:
    session = session_of(node_graph(random_matrix(20, 64, 4, 32, "offset")), cpu_library())
    zeros = session.run(None, {"x": np.zeros((1, 2, 64), np.float32)})[0]
    assert not zeros.any()
    assert session.run(None, {"x": np.zeros((0, 3, 64), np.float32)})[0].shape == (0, 3, 20)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zero", ["sym", "asym", "offset"])
def test_what_is_no_number_spoils_its_own_row_and_no_other(broken: float, zero: str) -> None:
    session = session_of(node_graph(random_matrix(20, 64, 4, 32, zero)), cpu_library())
    x = inputs(3, 64)
    expected = session.run(None, {"x": x})[0]
    x[0, 1, 5] = broken
    found = session.run(None, {"x": x})[0]
    assert np.isnan(found[0, 1]).all()
    assert np.array_equal(found[0, [0, 2]], expected[0, [0, 2]])


def _spoilt(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_model_from_string(node_graph(random_matrix(20, 64, 4, 32, "sym")))
    change(model)
    return bytes(model.SerializeToString())


def test_a_block_that_the_kernels_do_not_know_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        next(a for a in model.graph.node[0].attribute if a.name == "block_size").i = 24

    with pytest.raises(Exception, match="blocks of 16 to 256"):
        session_of(_spoilt(change), cpu_library())


def test_a_matrix_that_is_computed_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node.insert(0, onnx.helper.make_node("Abs", ["given"], ["scales"]))
        model.graph.input.append(onnx.helper.make_tensor_value_info("given", 1, [40]))
        kept = [t for t in model.graph.initializer if t.name != "scales"]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)

    with pytest.raises(Exception, match="must be initializers"):
        session_of(_spoilt(change), cpu_library())


def test_a_matrix_whose_size_is_not_its_attributes_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        next(a for a in model.graph.node[0].attribute if a.name == "N").i = 4000

    with pytest.raises(Exception, match="sizes of a matrix"):
        session_of(_spoilt(change), cpu_library())


_OTHER_INSTRUCTIONS = """
import json, sys
import numpy as np
from pipeline.kernels.cpu_library import cpu_library
from tests.ort_plugins.matmul_blocks.test_kernels import SHAPES, inputs
from tests.support.block_products import (
    look_up_graph,
    node_graph,
    random_matrix,
    session_of,
    skip_graph,
)

print(json.dumps([
    session_of(node_graph(random_matrix(*shape)), cpu_library())
    .run(None, {"x": inputs(5, shape[1])})[0].tobytes().hex()
    for shape in SHAPES
]))
"""


@pytest.mark.skipif("avx512_vnni" not in cpu_flags(), reason="this processor has no AVX-512 VNNI")
def test_narrower_instructions_compute_the_same_bits() -> None:
    found = {}
    for kind in ("avx512", "avx2"):
        answer = subprocess.run(
            [sys.executable, "-c", _OTHER_INSTRUCTIONS],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
            env=os.environ | {"SKIPCAT_KERNELS": kind},
        )  # fmt: skip
        found[kind] = json.loads(answer.stdout.splitlines()[-1])
    assert found["avx512"] == found["avx2"]


def test_the_reference_multiplies_with_what_the_codes_stand_for() -> None:
    matrix = Matrix(
        np.array([[[0x21, 0x43] * 4]], np.uint8),
        np.array([[0.5]], np.float32),
        4,
        16,
        rests=np.array([[1.0]], np.float32),
    )
    x = np.zeros((1, 16), np.float32)
    x[0, :2] = 127, -127  # of which 8 bits lose nothing
    weights = (np.array([1, 2]) - 8) * 0.5 + 1
    np.testing.assert_allclose(matmul_blocks(x, matrix), [[127 * (weights[0] - weights[1])]])
