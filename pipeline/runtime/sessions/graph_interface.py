"""An ONNX graph against the record beside it, before anything of the record's size is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError, PipelineError, ResourceError, first_line
from pipeline.export.contract import (
    ATTENTION_MASK,
    FIRST_LOGIT,
    FLOAT16,
    FLOAT32,
    GRAPH_FILE,
    INPUT_IDS,
    INT8,
    LOGITS,
    PIXEL_VALUES,
    POSITION_IDS,
    RECORD_FILE,
    present_name,
)
from pipeline.export.record import ExportRecord, wrong_field
from pipeline.json_file import read_json_object

if TYPE_CHECKING:
    import onnxruntime

_ORT_TYPES = {FLOAT32: "tensor(float)", FLOAT16: "tensor(float16)", INT8: "tensor(int8)"}
_IDS = "tensor(int64)"
# No model has as many positions; a record that says so would only ask for memory.
_LONGEST = 1 << 24
_OUT_OF_MEMORY = ("bad_alloc", "failed to allocate memory", "out of memory")
# Characters of what ONNX Runtime says: it may print a whole graph.
LONGEST_REASON = 400
_EXPORT_AGAIN = "export the checkpoint again"


def require_decoder_graph(
    session: onnxruntime.InferenceSession,
    record: ExportRecord,
    folder: Path,
    *,
    grows: bool = False,
) -> dict[str, tuple[int, int]]:
    """(heads, width) of each `past_key_values.*` input, after checking the graph's interface.

    The width is read from the graph, since a compressed cache need not be head_dim wide.

    Args:
        session: over the graph.
        record: what `export.json` says of it.
        folder: of both.
        grows: a cache of fixed length has been let be shorter.

    Raises:
        InputError: the graph's inputs and outputs are not those that `export.json` promises, or
            it promises more tokens than the model has positions.
    """
    _require_length(record, folder)
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    if 2 * record.num_layers > len(inputs):
        raise wrong_field(
            folder / RECORD_FILE, "num_layers", record.num_layers, f"as {GRAPH_FILE} has"
        )
    past = list(record.cache_dtypes)
    optional = {POSITION_IDS, FIRST_LOGIT} if record.traits.contrib else set()
    needed = {INPUT_IDS, ATTENTION_MASK, POSITION_IDS, *past} - optional
    _require_names(set(inputs) - optional, needed, "inputs", folder)
    _require_names(set(outputs), {LOGITS, *map(present_name, past)}, "outputs", folder)
    kind = _ORT_TYPES[FLOAT32 if record.traits.contrib else record.dtype]
    for name in inputs.keys() - set(past):
        _require_tensor(inputs[name], _IDS, [None] if name == FIRST_LOGIT else [None] * 2, folder)
    length = record.max_length if record.traits.fixed_length and not grows else None
    for name, dtype in record.cache_dtypes.items():
        held = _ORT_TYPES[dtype]
        _require_cache(inputs[name], held, length, folder)
        _require_tensor(outputs[present_name(name)], held, _widths(inputs[name].shape), folder)
    _require_tensor(outputs[LOGITS], kind, [None, None, record.vocab_size], folder)
    return {name: (inputs[name].shape[1], inputs[name].shape[3]) for name in past}


def require_image_graph(
    session: onnxruntime.InferenceSession,
    record: ExportRecord,
    returned: Mapping[str, tuple[int, ...]],
    folder: Path,
) -> None:
    """Hold a graph that takes images to its record.

    Args:
        session: over the graph.
        record: what `export.json` says of it.
        returned: name of each output -> its shape without the batch.
        folder: of both.

    Raises:
        InputError: its inputs and outputs are not those that `export.json` promises.
    """
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    _require_names(set(inputs), {PIXEL_VALUES}, "inputs", folder)
    _require_names(set(outputs), set(returned), "outputs", folder)
    kind = _ORT_TYPES[record.dtype]
    _require_tensor(inputs[PIXEL_VALUES], kind, [None, *record.pixel_values], folder)
    for name, shape in returned.items():
        _require_tensor(outputs[name], kind, [None, *shape], folder)


def require_logits(logits: np.ndarray, shape: tuple[int, ...], graph: Path) -> None:
    """Raise InputError unless a graph gave logits of the shape that its record promises."""
    if logits.shape != shape:
        raise InputError(
            f"The graph's logits are not what {RECORD_FILE} promises.",
            where=graph,
            observed=f"shape {list(logits.shape)}",
            expected=f"shape {list(shape)}",
            change=_EXPORT_AGAIN,
        )


@contextmanager
def explained(graph: Path) -> Iterator[None]:
    """Give whatever ONNX Runtime raises while it runs a graph a message for the user.

    Raises:
        InputError: the graph cannot be run.
        ResourceError: memory ran out.
    """
    try:
        yield
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # its exceptions share no base class but this one
        if any(words in str(error).lower() for words in _OUT_OF_MEMORY):
            raise ResourceError(
                "Out of memory while the graph ran.",
                where=graph,
                observed=first_line(error)[:LONGEST_REASON],
                change="use fewer tokens at once, or a smaller model",
            ) from error
        raise InputError(
            "ONNX Runtime cannot run this graph.",
            where=graph,
            observed=first_line(error)[:LONGEST_REASON],
            change=_EXPORT_AGAIN,
        ) from error


def _require_length(record: ExportRecord, folder: Path) -> None:
    """Raise InputError for a cache of more tokens than the config beside it has positions."""
    limit = _LONGEST
    if (folder / "config.json").is_file():
        config = read_json_object(folder / "config.json")
        text = config.get("text_config")
        for fields in (config, text if isinstance(text, dict) else {}):
            positions = fields.get("max_position_embeddings")
            limit = min(limit, positions) if type(positions) is int and positions > 0 else limit
    if record.max_length > limit:
        raise wrong_field(
            folder / RECORD_FILE, "max_length", record.max_length, f"at most {limit} positions"
        )


def _require_names(observed: set[str], expected: set[str], kind: str, folder: Path) -> None:
    """Raise InputError when two sets of tensor names differ, naming the difference."""
    if observed != expected:
        raise InputError(
            f"The graph's {kind} are not those that {RECORD_FILE} promises.",
            where=folder / GRAPH_FILE,
            observed=f"unexpected {sorted(observed - expected)[:4]}",
            expected=f"missing {sorted(expected - observed)[:4]}",
            change=_EXPORT_AGAIN,
        )


def _require_cache(node: Any, kind: str, length: int | None, folder: Path) -> None:
    """Raise InputError when a cache input has another dtype or static length than promised."""
    dims = list(node.shape)
    growing = length is None and len(dims) == 4 and not isinstance(dims[2], int)
    fixed = len(dims) == 4 and dims[2] == length
    sizes = [dims[1], dims[3]] if len(dims) == 4 else []
    if not (node.type == kind and (growing or fixed) and all(_is_size(size) for size in sizes)):
        raise _other_tensor(node, f"{kind} [batch, heads, {length or 'any length'}, width]", folder)


def _is_size(dim: object) -> bool:
    return isinstance(dim, int) and dim > 0


def _widths(shape: list[Any]) -> list[int | None]:
    """Heads and width of a cache tensor."""
    return [None, shape[1], None, shape[3]]


def _require_tensor(node: Any, kind: str, dims: list[Any], folder: Path) -> None:
    """Raise InputError unless a tensor has the type, the axes and the sizes promised.

    Args:
        node: of ONNX Runtime.
        kind: its type.
        dims: what each axis must be where the graph fixes it; None for anything.
        folder: of the graph.
    """
    fits = len(node.shape) == len(dims) and all(
        wanted is None or not isinstance(found, int) or found == wanted
        for found, wanted in zip(node.shape, dims, strict=True)
    )
    if node.type != kind or not fits:
        shape = ", ".join("any" if dim is None else str(dim) for dim in dims)
        raise _other_tensor(node, f"{kind} [{shape}]", folder)


def _other_tensor(node: Any, expected: str, folder: Path) -> InputError:
    return InputError(
        f"The tensor {node.name} is not what {RECORD_FILE} promises.",
        where=folder / GRAPH_FILE,
        observed=f"{node.type} {node.shape}",
        expected=expected,
        change=_EXPORT_AGAIN,
    )
