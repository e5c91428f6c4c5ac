"""Read and write a graph's weights without holding more of them than needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from pipeline.export.passes.stored_codes import note_moved_rows


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initializer or a Constant node; None for anything computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of a constant, without reading it; None for anything computed."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tuple(int(size) for size in tensor.shape)


def weight_shape(value: ir.Value) -> tuple[int, ...]:
    """Shape of a weight, without reading it.

    Raises:
        TypeError: the value is computed.
    """
    shape = shape_of(value)
    if shape is None:
        raise TypeError(f"{value.name} is no weight: it is computed")
    return shape


def new_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a small constant under `name`, or under that name with a number if it is taken."""
    return _register(graph, name, lambda unique: ir.tensor(array, name=unique))


def derived_weight(
    graph: ir.Graph,
    name: str,
    sources: list[ir.Value],
    shape: tuple[int, ...],
    function: Callable[..., np.ndarray],
    dtype: ir.DataType | None = None,
    moves_rows: bool = False,
) -> ir.Value:
    """Add a weight that is computed from others when it is written, and not kept.

    Args:
        graph: gets the new initializer.
        name: of it; a number is added if it is taken.
        sources: constants that `function` is given as arrays, in this order.
        shape: of the result.
        function: arrays to an array.
        dtype: of the result; None is that of the sources, of which there is one at least.
        moves_rows: `function` moves whole rows, so that codes of few bits may go with them.
    """
    tensors = [ir.convenience.get_const_tensor(source) for source in sources]

    def make(unique: str) -> ir.LazyTensor:
        return ir.LazyTensor(
            lambda: ir.tensor(
                np.ascontiguousarray(function(*(tensor.numpy() for tensor in tensors))),
                name=unique,
            ),
            dtype=dtype or tensors[0].dtype,
            shape=ir.Shape(shape),
            name=unique,
        )

    value = _register(graph, name, make)
    if moves_rows:
        note_moved_rows(value, sources, function)
    return value


def _register(graph: ir.Graph, name: str, make: Callable[[str], ir.TensorProtocol]) -> ir.Value:
    unique, number = name, 1
    while unique in graph.initializers:
        unique, number = f"{name}_{number}", number + 1
    tensor = make(unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(tensor.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
