"""`export.json`: what an exported ONNX folder says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artefact import sha256_of_file
from pipeline.errors import InputError
from pipeline.export.contract import (
    BOX_STRIDES,
    CACHES,
    CODE_TYPE,
    DTYPES,
    FLOAT,
    GRAPH_FILE,
    PIXEL_VALUES,
    PROFILES,
    RECORD_FILE,
    SCHEMA,
    STEP_TYPE,
    WEIGHTS,
    WEIGHTS_FILE,
    Profile,
    cache_names,
    steps_name,
)
from pipeline.json_file import json_field, read_json_object
from pipeline.known_hashes import known_sha256
from pipeline.model.task import TASKS, TEXT, Task

# What every record has; `TASKS` says what those of each task have beside.
_FIELD_TYPES: dict[str, type] = {"profile": str, "dtype": str, "onnx_sha256": str}
_EXPORT_AGAIN = "export the checkpoint again"
_SIDES = 3


@dataclass(frozen=True)
class ExportRecord:
    """The part of `export.json` that running the graph depends on.

    Attributes:
        profile: `opset24` (static cache, written in place), `compat` (growing cache) or `cpu`
            (ONNX Runtime's own operators).
        dtype: of weights, cache and logits.
        onnx_sha256: hex digest of `model.onnx`.
        max_length: most tokens of prompt and answer; 0 for a model that takes none.
        vocab_size: width of the logits; 0 for an image classifier.
        num_layers: number of key/value pairs; 0 for a model without a cache.
        weights: `float`, which is `dtype`, `stored` for the codes of the checkpoint, or how many
            bits the export rounds the matrices to.
        accuracy_level: of ONNX Runtime's quantised products: 4 rounds their inputs to 8 bits, 0
            does not; None where there are none.
        exact_weights: whether the export kept the checkpoint's matrices as they are, up to the
            last bits of float16.
        cache_format: of keys and values: "float", which is `dtype`, or "int8".
        coded: names of the cache's inputs that hold latents in codes.
        data_bytes: size of `model.onnx.data`; None where an older version did not say.
        data_sha256: its hex digest, likewise.
        task: what the graph does.
        pixel_values: channels, height and width of an image; empty for a language model.
        classes: width of an image classifier's logits; 0 for others.
        labels: what a driving network's boxes are of; empty for others.
        anchors: sides in pixels, by stride and number, that its boxes are told by; likewise.
    """

    profile: str
    dtype: str
    onnx_sha256: str
    max_length: int = 0
    vocab_size: int = 0
    num_layers: int = 0
    weights: str = FLOAT
    task: Task = TEXT
    pixel_values: tuple[int, ...] = ()
    classes: int = 0
    labels: tuple[str, ...] = ()
    anchors: tuple[tuple[tuple[float, ...], ...], ...] = ()
    accuracy_level: int | None = None
    exact_weights: bool = False
    cache_format: str = FLOAT
    coded: tuple[str, ...] = ()
    data_bytes: int | None = None
    data_sha256: str | None = None

    @property
    def traits(self) -> Profile:
        """What its profile says of the graph."""
        return PROFILES[self.profile]

    @property
    def cache_dtypes(self) -> dict[str, str]:
        """Type of every input of the cache: NumPy's name for it."""
        held = self.dtype if self.cache_format == FLOAT else self.cache_format
        sides = {
            name: CODE_TYPE if name in self.coded else held for name in cache_names(self.num_layers)
        }
        return sides | {steps_name(name): STEP_TYPE for name in self.coded}


def read_export_record(folder: Path, tasks: tuple[Task, ...] = (TEXT,)) -> ExportRecord:
    """Read `folder/export.json` and check it against itself, `model.onnx` and the weights' size.

    Args:
        folder: what `skipcat export` wrote.
        tasks: those that the caller can do something with.

    Raises:
        InputError: a file is missing, a field is missing or wrong, the graph is not the one that
            the record was written for, or does something else than `tasks`.
    """
    path = _require_file(folder / RECORD_FILE)
    record = _parse_record(read_json_object(path, change=_EXPORT_AGAIN), path)
    if record.task not in tasks:
        raise InputError(
            "This export is of another kind of model than is needed here.",
            where=folder,
            observed=f"a graph for {record.task}",
            expected=f"one for {' or '.join(tasks)}",
        )
    _require_same_graph(record, _require_file(folder / GRAPH_FILE))
    _require_size(record, folder / WEIGHTS_FILE)
    return record


def require_weights(folder: Path, record: ExportRecord, *, known: bool = True) -> None:
    """Hold the weights to the hash in the record; one of an older version may have none.

    Args:
        folder: of both.
        record: as `read_export_record` gives it.
        known: the hash that the file had when it was last read will do, if it was not changed.

    Raises:
        InputError: they are other weights, or a copy that broke.
    """
    path = folder / WEIGHTS_FILE
    if record.data_sha256 is None or not path.is_file():
        return
    digest = known_sha256(path, again=not known)
    if digest != record.data_sha256:
        raise _other_weights(path, f"sha256 {digest}", f"sha256 {record.data_sha256}")


def _require_size(record: ExportRecord, path: Path) -> None:
    """Raise InputError for weights of another size than the record says."""
    if record.data_bytes is None or not path.is_file():
        return
    size_bytes = path.stat().st_size
    if size_bytes != record.data_bytes:
        raise _other_weights(path, f"{size_bytes} bytes", f"{record.data_bytes} bytes")


def _other_weights(path: Path, observed: str, expected: str) -> InputError:
    return InputError(
        f"{path.name} is truncated or broken, or belongs to another export: with it a runtime "
        "cannot load this graph.",
        where=path,
        observed=observed,
        expected=expected,
        change="copy the whole folder again, or export again",
    )


def _parse_record(fields: dict[str, Any], path: Path) -> ExportRecord:
    """Build the record out of parsed JSON.

    Raises:
        InputError: another schema, a field that is missing or has the wrong type, a number that
            counts nothing, or a profile or dtype that this version does not know.
    """
    if fields.get("schema") != SCHEMA:
        raise InputError(
            "This export was written by another version of skipcat.",
            where=path,
            observed=f"schema {fields.get('schema')!r}",
            expected=f"schema {SCHEMA}",
            change=_EXPORT_AGAIN,
        )
    task = fields.get("task", TEXT)
    if not isinstance(task, str) or task not in TASKS:
        raise wrong_field(path, "task", task, " or ".join(TASKS))
    own: dict[str, Any] = {}
    for name, kind in (_FIELD_TYPES | TASKS[task].record_fields).items():
        own[name] = json_field(fields, name, kind, path)
        if kind is int:
            _require_count(path, name, own[name])
        elif kind is list:
            own[name] = _LISTS[name](path, name, own[name])
    for name, known in (("profile", PROFILES), ("dtype", DTYPES)):
        if own[name] not in known:
            raise wrong_field(path, name, own[name], " or ".join(known))
    weights = json_field(fields, "weights", str, path, default=FLOAT)
    if weights not in WEIGHTS:
        raise wrong_field(path, "weights", weights, " or ".join(WEIGHTS))
    cache_format = json_field(fields, "cache_format", str, path, default=FLOAT)
    if cache_format not in CACHES:
        raise wrong_field(path, "cache_format", cache_format, " or ".join(CACHES))
    return ExportRecord(
        **own,
        weights=weights,
        cache_format=cache_format,
        coded=_coded(fields, own.get("num_layers", 0), path),
        accuracy_level=json_field(fields, "accuracy_level", int, path, default=None),
        exact_weights=fields.get("exact_weights") is True,
        task=task,
        data_bytes=json_field(fields, "data_bytes", int, path, default=None),
        data_sha256=json_field(fields, "data_sha256", str, path, default=None),
    )


def _coded(fields: dict[str, Any], layers: int, path: Path) -> tuple[str, ...]:
    """Names of the inputs that hold codes, by the entries of `cache`; old records have none.

    Raises:
        InputError: the entries are none of ours.
    """
    entries = json_field(fields, "cache", list, path, default=None) or []
    if entries and (len(entries) != layers or not all(isinstance(one, dict) for one in entries)):
        raise wrong_field(
            path, "cache", f"{len(entries)} entries", f"an object for {layers} layers"
        )
    names = cache_names(layers)
    return tuple(
        names[2 * layer + number]
        for layer, entry in enumerate(entries)
        for number, side in enumerate(("key", "value"))
        if entry.get(f"{side}_bits") is not None
    )


def _require_count(path: Path, name: str, value: int) -> None:
    """Raise InputError unless a field counts something."""
    if value < 1:
        raise wrong_field(path, name, value, "at least 1")


def _image_shape(path: Path, name: str, value: list[Any]) -> tuple[int, ...]:
    """Channels, height and width.

    Raises:
        InputError: it is something else.
    """
    if len(value) != _SIDES or any(type(side) is not int or side < 1 for side in value):
        raise wrong_field(path, name, value, "channels, height and width")
    return tuple(value)


def _labels(path: Path, name: str, value: list[Any]) -> tuple[str, ...]:
    """Names of classes, one at least.

    Raises:
        InputError: they are something else.
    """
    if not value or not all(isinstance(label, str) for label in value):
        raise wrong_field(path, name, value, "names of classes")
    return tuple(value)


def _anchors(path: Path, name: str, value: list[Any]) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Pairs of sides above 0, as many for each stride.

    Raises:
        InputError: they are something else.
    """
    try:
        levels = tuple(tuple(tuple(map(float, pair)) for pair in level) for level in value)
    except (TypeError, ValueError):
        levels = ()
    sides = [pair for level in levels for pair in level]
    alike = len({len(level) for level in levels}) == 1 and len(levels) == len(BOX_STRIDES)
    if not alike or not all(len(pair) == 2 and min(pair) > 0 for pair in sides):
        raise wrong_field(path, name, value, f"pairs of sides for each of {len(BOX_STRIDES)}")
    return levels


# Fields that are lists, of whichever task, by their names.
_LISTS = {PIXEL_VALUES: _image_shape, "labels": _labels, "anchors": _anchors}


def _require_same_graph(record: ExportRecord, onnx_path: Path) -> None:
    """Raise InputError when `model.onnx` is not the file that the record describes."""
    digest = sha256_of_file(onnx_path)
    if digest != record.onnx_sha256:
        raise InputError(
            f"{GRAPH_FILE} does not belong to the {RECORD_FILE} beside it.",
            where=onnx_path,
            observed=f"sha256 {digest}",
            expected=f"sha256 {record.onnx_sha256}",
            change=_EXPORT_AGAIN,
        )


def _require_file(path: Path) -> Path:
    """Return `path`; raise InputError when there is no such file."""
    if not path.is_file():
        raise InputError(
            f"{path.name} is missing.",
            where=path.parent,
            change="give a folder that `skipcat export` wrote",
        )
    return path


def wrong_field(path: Path, name: str, observed: object, expected: str) -> InputError:
    """The error for a field of `export.json` with a value this version cannot use."""
    return InputError(
        f"The field '{name}' of {RECORD_FILE} is wrong.",
        where=path,
        observed=repr(observed),
        expected=expected,
        change=_EXPORT_AGAIN,
    )
