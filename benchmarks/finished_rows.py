"""Rows of a table that an earlier run has measured, of the same model, texts and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.json_file import read_json_object


def finished_rows(
    result: Path, record: Mapping[str, Any], identity: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of a result that is there; none where there is none.

    Args:
        result: JSON with `rows`.
        record: what this run will write.
        identity: fields of it that say what is measured.

    Raises:
        InputError: the JSON differs from the record in one of these.
    """
    if not result.is_file():
        return []
    before = read_json_object(result)
    other = [name for name in identity if before.get(name) != record[name]]
    if other:
        raise InputError(
            "The rows that are there were measured otherwise.",
            where=result,
            observed=", ".join(f"{name} {before.get(name)}" for name in other),
            expected=", ".join(f"{name} {record[name]}" for name in other),
            change="pass another --json, or move the file away",
        )
    rows: list[dict[str, Any]] = before["rows"]
    return rows
