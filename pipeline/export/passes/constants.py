"""Read and write a graph's weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initializer or a Constant node; None for anything computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def new_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a weight under `name`, or under that name with a number if it is taken."""
    unique, number = name, 1
    while unique in graph.initializers:
        unique, number = f"{name}_{number}", number + 1
    tensor = ir.tensor(np.ascontiguousarray(array), name=unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
