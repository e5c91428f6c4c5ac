"""plan.json, which people edit: read field by field, and refused by the name of group and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.json_file import json_field, read_json_object
from pipeline.quantize.formats import Format

# plan.json says "style" where everything else says "format".
WRITTEN_AS = {"down_format": "down_style", "up_format": "up_style"}
_GROUP_FIELDS = {
    "members", "rows", "columns", "form", "rank", "reason", "expected_kl", *WRITTEN_AS.values(),
    "dense_parameters", "kept_parameters",
}  # fmt: skip
_WIDEST_BLOCK = 256  # that a runtime takes; the last one of a row is filled up


def read_plan_file(
    path: Path, schema: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str], dict[str, Any] | None]:
    """The groups of every layer, the formats of embeddings and heads, and the cache.

    Args:
        path: of plan.json.
        schema: that it must be of.

    Returns:
        Layer -> its groups, each the attributes of a `GroupPlan`; module -> format; and the section
        `caches` as it is, None where there is none.

    Raises:
        InputError: a field is missing, unknown, of another type, or has no such value; names it
            and the group.
    """
    raw = read_json_object(path)
    if json_field(raw, "schema", int, path, default=schema) != schema:
        raise InputError("Another version wrote it.", where=path, expected=f"schema {schema}")
    layers = json_field(raw, "layers", dict, path)
    planned = {}
    for layer in layers:
        entries = json_field(layers, layer, list, f"{path}: layers")
        places = [f"{path}: {layer}, group {number}" for number in range(1, len(entries) + 1)]
        planned[layer] = list(map(_group_from, entries, places))
    named = json_field(raw, "tables", dict, path, default=None) or {}
    found = {name: _format_field(named, name, f"{path}: tables") for name in named}
    formats = {name: format for name, format in found.items() if format}
    return planned, formats, json_field(raw, "caches", dict, path, default=None)


def _group_from(entry: Any, where: str) -> dict[str, Any]:
    """One group, as the attributes of a `GroupPlan`."""
    fields: dict[str, Any] = json_field({"group": entry}, "group", dict, where)
    members = json_field(fields, "members", list, where)
    members = [json_field({"members": name}, "members", str, where) for name in members]
    where += f" ({', '.join(members)})"
    unknown = sorted(fields.keys() - _GROUP_FIELDS)
    if unknown or not members:
        odd = f"The field '{unknown[0]}' is not known." if unknown else "It has no members."
        raise InputError(odd, where=where, expected=", ".join(sorted(_GROUP_FIELDS)))
    form = json_field(fields, "form", str, where)
    if form not in ("dense", "low_rank", "skip"):
        raise InputError(
            "The field 'form' is wrong.", where=where, observed=repr(form),
            expected="dense, low_rank or skip",
        )  # fmt: skip
    sizes = {name: json_field(fields, name, int, where) for name in ("rows", "columns", "rank")}
    formats = {
        name: _format_field(fields, written, where, sizes["columns"])
        for name, written in WRITTEN_AS.items()
    }
    if form == "dense" and formats["down_format"] is not None:
        raise InputError(
            "The field 'down_style' is wrong.", where=where, observed=formats["down_format"],
            expected="null: a dense group has up_style alone",
        )  # fmt: skip
    told = {
        "reason": json_field(fields, "reason", str, where, default=None),
        "expected_kl": json_field(fields, "expected_kl", float, where, default=None),
    }
    return {"members": tuple(members), "form": form} | sizes | formats | told


def _format_field(
    fields: dict[str, Any], name: str, where: str, columns: int | None = None
) -> str | None:
    """A low-bit format's name as it is written, checked; its block no wider than is of use."""
    written = json_field(fields, name, str, where, default=None)
    if written is None:
        return None
    try:
        format = Format.parse(written)
    except ValueError as error:
        raise InputError(f"The field '{name}' is wrong.", where=where, observed=error) from error
    if columns is not None and format.block > max(columns, _WIDEST_BLOCK):
        raise InputError(
            f"The field '{name}' is wrong.", where=where, observed=f"blocks of {format.block}",
            expected=f"at most {columns}, the width of the group",
        )  # fmt: skip
    return format.name
