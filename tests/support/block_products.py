"""Graphs of single MatMulBlocks and BlockSkipBlocks nodes, with and without the kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ort_plugins.matmul_blocks.reference import Matrix, unpacked
from pipeline.export.contract import (
    BLOCK_SKIP_BLOCKS_OPS,
    CONTRIB,
    DOMAIN,
    LOOK_UP_BLOCKS_OPS,
    MATMUL_BLOCKS_OPS,
    OP_VERSION,
)
from pipeline.export.matmul_blocks import function_bodies

_OPSET = 23


def random_matrix(
    rows: int, columns: int, bits: int, block: int, zero: str, halves: bool = True
) -> Matrix:
    """A matrix of random codes, whose scales are float16 numbers if so wished."""
    rng = np.random.default_rng(rows * columns + bits + block)
    blocks = -(-columns // block)
    codes = rng.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    scales = rng.uniform(0.001, 0.01, (rows, blocks)).astype(np.float32)
    offsets = rng.normal(0, 0.05, (blocks, rows)).astype(np.float32)
    if halves:
        scales, offsets = (a.astype(np.float16).astype(np.float32) for a in (scales, offsets))
    zeros = rests = None
    if zero == "asym":
        zeros = rng.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
    elif zero == "offset":
        rests = offsets + np.float32(1 << (bits - 1)) * scales.T
    return Matrix(codes, scales, bits, columns, zeros, rests)


def node_graph(matrix: Matrix, bias: np.ndarray | None = None) -> bytes:
    """A graph of one node, y [B, S, N] of x [B, S, K], with the body of its operator."""
    given = _given(matrix, "") | ({} if bias is None else {"bias": bias})
    rows = len(matrix.codes)
    sizes = {"K": matrix.columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block}
    name = MATMUL_BLOCKS_OPS[_zero(matrix), bias is not None]
    return _graph(name, given, sizes, matrix.columns, rows)


def skip_graph(a: Matrix, b: Matrix, index: np.ndarray | None = None) -> bytes:
    """A graph of one node of two factors, likewise."""
    given = ({} if index is None else {"index": index}) | _given(a, "a_") | _given(b, "b_")
    rank, rows = len(a.codes), len(b.codes)
    sizes = {"N": rows, "rank": rank, "rest": a.columns}
    sizes |= {"bits_a": a.bits, "block_a": a.block, "bits_b": b.bits, "block_b": b.block}
    name = BLOCK_SKIP_BLOCKS_OPS[_zero(a), _zero(b), index is not None]
    return _graph(name, given, sizes, rank + a.columns, rows)


def look_up_graph(matrix: Matrix, head: bool) -> bytes:
    """A graph that looks ids up in a matrix, and, if so wished, multiplies with its codes."""
    rows, blocks, _ = matrix.codes.shape
    sizes = {"K": matrix.columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block}
    given = {"codes": matrix.codes, "row_scales": matrix.scales[..., None]}
    if matrix.zeros is not None:
        zeros = unpacked(matrix.zeros, matrix.bits)[:, :blocks]
        given["row_zeros"] = zeros.astype(np.uint8)[..., None]
    name = LOOK_UP_BLOCKS_OPS[_zero(matrix)]
    nodes = [helper.make_node(name, ["ids", *given], ["rows"], domain=DOMAIN, **sizes)]
    outputs, names = {"rows": matrix.columns}, [name]
    if head:
        own = _given(matrix, "")
        names.append(MATMUL_BLOCKS_OPS[_zero(matrix), False])
        nodes.append(helper.make_node(names[1], ["rows", *own], ["y"], domain=DOMAIN, **sizes))
        outputs["y"], given = rows, given | own
    return _model(nodes, {"ids": (TensorProto.INT64, None)}, outputs, given, names)


def _zero(matrix: Matrix) -> str:
    return "asym" if matrix.zeros is not None else "sym" if matrix.rests is None else "offset"


def _given(matrix: Matrix, prefix: str) -> dict[str, np.ndarray]:
    """Inputs that hold a matrix, in the order of the operators."""
    given = {"codes": matrix.codes, "scales": matrix.scales.reshape(-1)}
    if matrix.zeros is not None:
        given["zeros"] = matrix.zeros.reshape(-1)
    if matrix.rests is not None:
        blocks = len(matrix.rests)
        ones = np.repeat(np.eye(blocks, dtype=np.float32), matrix.block, axis=0)
        given |= {"rests": matrix.rests, "ones": ones[: matrix.columns]}
    return {prefix + name: array for name, array in given.items()}


def _graph(
    name: str, given: dict[str, np.ndarray], sizes: dict[str, Any], columns: int, rows: int
) -> bytes:
    node = helper.make_node(name, ["x", *given], ["y"], domain=DOMAIN, **sizes)
    return _model([node], {"x": (TensorProto.FLOAT, columns)}, {"y": rows}, given, [name])


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, int | None]],
    outputs: dict[str, int],
    given: dict[str, np.ndarray],
    names: list[str],
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "product",
        [
            helper.make_tensor_value_info(name, kind, ["B", "S", *([width] if width else [])])
            for name, (kind, width) in inputs.items()
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "S", width])
            for name, width in outputs.items()
        ],
        [numpy_helper.from_array(array, key) for key, array in given.items()],
    )
    versions = {"": _OPSET, DOMAIN: OP_VERSION, CONTRIB: 1}
    bodies = function_bodies(_OPSET, names)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*pair) for pair in versions.items()],
        functions=[ir.serde.serialize_function(body) for body in bodies.values()],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def session_of(
    graph: bytes, library: Path | None, threads: int = 1
) -> onnxruntime.InferenceSession:
    """The graph in ONNX Runtime, with the kernels of a library or by the bodies."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
