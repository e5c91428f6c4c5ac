"""A static cache that begins short: ONNX Runtime's attention reads every slot, also the empty ones.

The graph of an engine has a cache of fixed length, whose slots a constant numbers for the mask. On
the CPU the length may be an input's own:

    past [B, H, 2048, D]        ->  past [B, H, slots, D]
    [0, 1, ..., 2047], int64    ->  Slice([0, 1, ..., 2047], 0, slots)

Slots that the mask closes weigh nothing, so that their number changes no logit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.export.contract import CACHE_PREFIX

# Whole vectors and blocks of every kernel: sums of scores are added in one order at any length.
FIRST_SLOTS = 256
_SLOTS = "cache_slots"


def growing_slots(path: Path, length: int) -> bytes | None:
    """The graph with a cache of any length up to `length`; None where it is of another form.

    Args:
        path: of an ONNX file; its external data lies beside it.
        length: slots of its cache.

    Returns:
        The graph, which leaves its weights in the external data; or None: the cache is short, or
        something besides attention and the numbers of slots depends on its length.
    """
    if length <= FIRST_SLOTS:
        return None
    import onnx

    model = onnx.load_model_from_string(path.read_bytes())
    graph = model.graph
    past = [value for value in graph.input if value.name.startswith(CACHE_PREFIX)]
    if not past or any(_slots_of(value) != length for value in past):
        return None
    readers = _readers(graph)
    if not all(_is_read_by_attention(value.name, readers) for value in past):
        return None
    numbers = _numbers_of_slots(graph, path.parent, length)
    if not numbers:
        return None
    _cut(graph, past[0].name, numbers)
    for value in (*past, *graph.output):
        if _slots_of(value) == length:
            value.type.tensor_type.shape.dim[2].dim_param = _SLOTS
    del graph.value_info[:]
    return bytes(model.SerializeToString())


def slots_for(tokens: int, most: int) -> int:
    """Slots of a cache that is to hold so many tokens: doubled from `FIRST_SLOTS` on."""
    slots = FIRST_SLOTS
    while slots < tokens:
        slots *= 2
    return min(slots, most)


def _slots_of(value: Any) -> int | None:
    """The third of four sizes, where it is fixed."""
    sizes = value.type.tensor_type.shape.dim
    return int(sizes[2].dim_value) if len(sizes) == 4 else None


def _readers(graph: Any) -> dict[str, list[Any]]:
    """Tensor -> the nodes that read it."""
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _is_read_by_attention(past: str, readers: dict[str, list[Any]]) -> bool:
    """Whether a cache is written by TensorScatter, and what that returns read by attention."""
    own = readers.get(past, [])
    if [node.op_type for node in own] != ["TensorScatter"]:
        return False
    present = own[0].output[0]
    return all(
        (node.domain, node.op_type) == ("", "Attention") and present in node.input[1:3]
        for node in readers.get(present, [])
    )


def _numbers_of_slots(graph: Any, folder: Path, length: int) -> list[str]:
    """Names of constants 0, 1, ..., length - 1; none where another holds the length as a number."""
    import onnx
    from onnx import numpy_helper

    found = []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT64:
            continue
        values = numpy_helper.to_array(tensor, str(folder))
        if values.shape[-1:] == (length,) and np.array_equal(values.ravel(), np.arange(length)):
            found.append(tensor.name)
        elif values.size < length and (values == length).any():
            return []
    return found


def _cut(graph: Any, past: str, numbers: list[str]) -> None:
    """Let what reads the numbers of slots read as many as the cache has."""
    from onnx import helper, numpy_helper

    shown = {name: f"{name}.of_{_SLOTS}" for name in numbers}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = shown.get(name, name)
    start, axis = f"{_SLOTS}.start", f"{_SLOTS}.axis"
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), start))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), axis))
    nodes = [helper.make_node("Shape", [past], [_SLOTS], start=2, end=3)]
    nodes += [
        helper.make_node("Slice", [name, start, _SLOTS, axis], [cut]) for name, cut in shown.items()
    ]
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
