"""Graphs of single MatMulBlocks nodes, with and without the kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ort_plugins.matmul_blocks.reference import Matrix
from pipeline.export.contract import CONTRIB, DOMAIN, OP_VERSION, matmul_blocks_op
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
    rows, blocks, _ = matrix.codes.shape
    zero = "asym" if matrix.zeros is not None else "sym" if matrix.rests is None else "offset"
    given = {"codes": matrix.codes, "scales": matrix.scales.reshape(-1)}
    if matrix.zeros is not None:
        given["zeros"] = matrix.zeros.reshape(-1)
    if matrix.rests is not None:
        ones = np.repeat(np.eye(blocks, dtype=np.float32), matrix.block, axis=0)
        given |= {"rests": matrix.rests, "ones": ones[: matrix.columns]}
    if bias is not None:
        given["bias"] = bias
    name = matmul_blocks_op(zero, bias is not None)
    sizes = {"K": matrix.columns, "N": rows, "bits": matrix.bits, "block_size": matrix.block}
    node = helper.make_node(name, ["x", *given], ["y"], domain=DOMAIN, **sizes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", matrix.columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", rows])],
        [numpy_helper.from_array(array, key) for key, array in given.items()],
    )
    versions = {"": _OPSET, DOMAIN: OP_VERSION, CONTRIB: 1}
    body = function_bodies(_OPSET, [name])[name]
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*pair) for pair in versions.items()],
        functions=[ir.serde.serialize_function(body)],
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
