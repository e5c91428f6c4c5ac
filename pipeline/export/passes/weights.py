"""Read and write a graph's weights without holding more of them than needed.

Weights that a checkpoint holds quantised, and what becomes of their codes as passes move rows.

A pass sees such a weight as the matrix that its codes stand for. The codes themselves go along as
a note on the value, so that a runtime is given exactly those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks


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
        moves_rows: `function` moves whole rows, so that codes may go with them.
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
        _note_moved_rows(value, sources, function)
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


_NOTE = "skipcat.codes"


@dataclass(frozen=True)
class StoredCodes:
    """The codes behind a weight [m, n] in torch's order.

    Attributes:
        format: of the codes.
        read: reads or computes them, each time anew.
    """

    format: Format
    read: Callable[[], Blocks]

    @staticmethod
    def of(value: ir.Value | None) -> StoredCodes | None:
        """The codes of a weight; None for one that is not quantised."""
        return None if value is None else value.meta.get(_NOTE)

    def note_on(self, value: ir.Value) -> None:
        """Remember them as those of a weight."""
        value.meta[_NOTE] = self


def quantized_lookups(graph: ir.Graph) -> list[tuple[ir.Node, StoredCodes]]:
    """Look-ups in a quantised embedding that is not the head as well, and its codes."""
    gathers = [node for node in graph if node.op_type == "Gather" and not node.domain]
    return [(node, codes) for node in gathers if (codes := StoredCodes.of(node.inputs[0]))]


def one_format(values: Sequence[ir.Value]) -> bool:
    """Whether all weights are stored alike: as numbers, or as codes of the same format."""
    formats = [codes.format if (codes := StoredCodes.of(value)) else None for value in values]
    return len(set(formats)) == 1


def _note_moved_rows(
    value: ir.Value, sources: Sequence[ir.Value], function: Callable[..., np.ndarray]
) -> None:
    """Give a weight whose rows are those of others, moved by `function`, their codes moved alike.

    Does nothing where the sources are not all quantised in one format.
    """
    every = [codes for source in sources if (codes := StoredCodes.of(source)) is not None]
    if len(every) < len(sources) or not one_format(sources):
        return

    def read() -> Blocks:
        return moved_rows([codes.read() for codes in every], function)

    StoredCodes(every[0].format, read).note_on(value)


def moved_rows(parts: Sequence[Blocks], function: Callable[..., np.ndarray]) -> Blocks:
    """Codes of one format with all that goes with them, moved by a function that moves rows."""
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return Blocks(
        function(*(part.codes for part in parts)),
        function(*(part.scales for part in parts)),
        function(*zeros) if zeros else None,
        parts[0].bits,
        parts[0].columns,
    )


def stacked_rows(*arrays: np.ndarray) -> np.ndarray:
    """Arrays one below the other."""
    return np.concatenate(arrays)
