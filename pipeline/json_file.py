"""JSON that somebody else may have written: read within limits, looked at before it is believed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar, overload

from pipeline.errors import InputError

# Python objects take up to 25 times the bytes of the text that they are written in.
LARGEST_BYTES = 16 << 20
_DEEPEST = 100
_NAMES = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip
T = TypeVar("T")
_REQUIRED: Any = object()


def read_json_object(path: Path, *, change: str | None = None) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: of the file; a byte order mark is passed over.
        change: what the user can do about a file that is wrong.

    Raises:
        InputError: it is missing, cannot be read, is larger than 16 MiB, is no UTF-8, no JSON,
            nested deeper than 100, holds a number that no program holds or half of a surrogate
            pair, or is no object.
    """
    value = parse_json(read_text_file(path, change=change), path, change=change)
    return _require(value, dict, path, f"{path.name} does not hold what it should.", change)


def read_text_file(
    path: Path, *, change: str | None = None, largest_bytes: int = LARGEST_BYTES
) -> str:
    """Read a file of at most 16 MiB of UTF-8, without its byte order mark.

    Args:
        path: of the file.
        change: what the user can do about a file that is wrong.
        largest_bytes: for the few files that are a whole data set.

    Raises:
        InputError: it is missing, cannot be read, is larger, or is no UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(largest_bytes + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"{path.name} cannot be read.", where=path.parent, observed=reason, change=change
        ) from error
    if len(content) > largest_bytes:
        raise InputError(
            f"{path.name} is too large to be what it should be.",
            where=path.parent,
            observed=f"more than {largest_bytes >> 20} MiB",
            change=change,
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path.name} is not UTF-8.",
            where=path.parent,
            observed=f"byte 0x{content[error.start]:02x} at {error.start}",
            change=change,
        ) from error


def parse_json(text: str, where: object, *, change: str | None = None) -> Any:
    """Parse JSON text of any kind.

    Args:
        text: the JSON.
        where: file, or file and line, for the message.
        change: what the user can do about it.

    Raises:
        InputError: as `read_json_object`; the value may be of any type.
    """
    try:
        value = json.loads(text)
        _look_through(value)
    except RecursionError:
        reason = f"nested deeper than {_DEEPEST}"
    except ValueError as error:  # also a number of thousands of digits
        reason = str(error)
    else:
        return value
    raise InputError(
        "This is not JSON that can be read.", where=where, observed=reason, change=change
    )


def _look_through(value: Any) -> None:
    """Refuse what JSON can say and no caller foresees."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [item for held in level for item in _held(held)]
        if not level:
            return
    raise RecursionError


def _held(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"half of a surrogate pair in {value[:40]!a}")
    return []


@overload
def json_field(fields: dict[str, Any], name: str, kind: type[T], where: object) -> T: ...


@overload
def json_field(
    fields: dict[str, Any], name: str, kind: type[T], where: object, *, default: T | None
) -> T | None: ...


def json_field(
    fields: dict[str, Any], name: str, kind: type[T], where: object, *, default: Any = _REQUIRED
) -> T | None:
    """One field of an object, of the type that it should have.

    Args:
        fields: the object.
        name: of the field.
        kind: dict, list, str, int, float or bool. True is no number; a whole number is a float.
        where: file and place, for the message.
        default: for a field that is not there or null; without one the field is required.

    Raises:
        InputError: the field is missing, of another type, or a number that is not finite.
    """
    value = fields.get(name)
    if value is None and default is not _REQUIRED:
        return default
    if value is None and name not in fields:
        raise InputError(f"The field '{name}' is missing.", where=where, expected=_NAMES[kind])
    return _require(value, kind, where, f"The field '{name}' is wrong.", None)


def restated(error: InputError, what: str, where: object) -> InputError:
    """The same error under a sentence that says what the file was wanted for.

    Args:
        error: of this module.
        what: that sentence.
        where: file or folder, if the error does not say.
    """
    told: dict[str, Any] = {"where": where, **error.details}
    told["observed"] = f"{error.what} {error.details.get('observed', '')}".strip()
    return InputError(what, **told)


def _require(value: Any, kind: type[T], where: object, what: str, change: str | None) -> T:
    if kind is float and type(value) is int:
        try:
            return float(value)  # type: ignore[return-value]
        except OverflowError:
            value = math.inf
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        observed = repr(value) if isinstance(value, int | float) else _NAMES.get(type(value))
        raise InputError(what, where=where, observed=observed, expected=_NAMES[kind], change=change)
    return value
