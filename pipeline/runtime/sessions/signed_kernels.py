"""Kernels of convolutions as signed bytes, where this processor multiplies those faster.

An export for the CPU holds them as uint8 counted from 128, since ONNX Runtime adds products of
uint8 and int8 in 16 bits on processors without VNNI, which saturate. Where there is VNNI they are
added in 32 bits, and its kernels for int8 take two thirds of the time of those for uint8. The
numbers are the same, and so is every bit of what is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.export.contract import DEQUANTIZE
from pipeline.machine import cpu_flags

_MIDDLE = 128
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni"}
_SIGNED = ".signed"


def prefers_signed() -> bool:
    """Whether this processor adds products of uint8 and int8 in 32 bits, in one instruction."""
    return bool(_DOT_PRODUCTS & set(cpu_flags()))


def signed_kernels(path: Path) -> bytes | None:
    """The graph with int8 for uint8 counted from 128; None where it has none of these.

    Args:
        path: of an ONNX file; its external data lies beside it.

    Returns:
        The graph, which holds these kernels itself and leaves all else in the external data.
    """
    content = path.read_bytes()
    if DEQUANTIZE.encode() not in content:
        return None
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(content)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def values(name: str) -> np.ndarray:
        return numpy_helper.to_array(stored[name], str(path.parent))

    found = [
        node
        for node in model.graph.node
        if node.op_type == DEQUANTIZE
        and len(node.input) == 3
        and {node.input[0], node.input[2]} <= stored.keys()
        and stored[node.input[0]].data_type == onnx.TensorProto.UINT8
        and len(stored[node.input[0]].dims) > 1
        and bool((values(node.input[2]) == _MIDDLE).all())
    ]
    for node in found:
        codes, middle = values(node.input[0]), values(node.input[2])
        replaced = {0: (codes ^ np.uint8(_MIDDLE)).view(np.int8), 2: np.zeros_like(middle, np.int8)}
        for place, array in replaced.items():
            name = node.input[place] + _SIGNED
            if name not in stored:
                tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
                model.graph.initializer.append(tensor)
                stored[name] = tensor
            node.input[place] = name
    if not found:
        return None
    _drop_unused(model.graph)
    return bytes(model.SerializeToString())


def _drop_unused(graph: Any) -> None:
    """Take stored tensors that nothing reads any longer out of an `onnx.GraphProto`."""
    read = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
