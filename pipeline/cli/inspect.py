"""`skipcat inspect`: what a model, checkpoint, ONNX folder or engine folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.export.contract import FLOAT16, GRAPH_FILE, INT8, PIXEL_VALUES, RECORD_FILE

_STEP_BYTES = 4  # step and low of a token and group


@click.command("inspect")
@click.argument("what")
@options.trust_remote_code
@options.json_output
def command(what: str, trust_remote_code: bool, as_json: bool) -> None:
    """Say what WHAT is: an alias, a model, a checkpoint, an ONNX folder, an engine, a build.

    \b
    skipcat inspect smollm2-135m
    skipcat inspect artefacts/smollm2-135m-keep0.8/onnx
    """  # noqa: D301 - click reads the escape
    kind, facts = _describe(what, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps({"kind": kind, **facts}, indent=2))
        return
    from rich.table import Table

    from pipeline.progress import result_console

    table = Table(title=f"{what}: {kind}", show_header=False)
    table.add_column()
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    result_console().print(table)


def _describe(what: str, *, trust_remote_code: bool = False) -> tuple[str, dict[str, Any]]:
    """Kind of artefact and its facts, by the record that its folder holds.

    Raises:
        pipeline.errors.InputError: nothing that skipcat knows, or its record is broken.
    """
    from pipeline.errors import InputError

    folder = Path(what)
    records = (
        (RECORD_FILE, "ONNX folder", _onnx_facts),
        ("manifest.json", "engine folder", _record_facts),
        ("build.json", "build folder", _build_facts),
        ("report.json", "compressed checkpoint", _checkpoint_facts),
    )
    for file, kind, facts in records:
        if (folder / file).is_file():
            try:
                return kind, facts(_read(folder / file), folder)
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    "The record is not one that skipcat wrote.",
                    where=folder / file,
                    observed=f"{type(error).__name__}: {error}",
                    expected=f"the record of a {kind}",
                ) from error
    return "model", _model_facts(what, trust_remote_code)


def _read(path: Path) -> dict[str, Any]:
    from pipeline.errors import InputError
    from pipeline.json_file import read_json_object, restated

    try:
        return read_json_object(path)
    except InputError as error:
        raise restated(error, "The record cannot be read.", path) from error


def _onnx_facts(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    from pipeline.export.record import read_export_record, require_weights
    from pipeline.model.task import TASKS

    if (folder / GRAPH_FILE).is_file():  # a record alone is shown as it is
        require_weights(folder, read_export_record(folder, tuple(TASKS)), known=False)
    names = (
        "task", "profile", "opset", "runs_in", "dtype", PIXEL_VALUES, "classes",
        "max_length", "max_length_bound", "num_layers", "block_skip_nodes",
        "permutations", "fused", "graph_bytes", "data_bytes", "onnx_sha256", "checkpoint",
        "cache_format", "cache_rounding",
    )  # fmt: skip
    facts = {name: record[name] for name in names if name in record}
    return facts | _graph_cache_facts(record)


def _graph_cache_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a token of keys and values takes; nothing of old records."""
    from pipeline.export.contract import held_width

    held = record.get("cache_format")
    if held is None:
        return {}
    number_bytes = 1 if held == INT8 else {FLOAT16: 2}.get(record["dtype"], 4)
    token_bytes = sum(
        heads * (number_bytes * width if bits is None else held_width(width, bits) + _STEP_BYTES)
        for shape in record["cache"]
        for heads, width, bits in (
            (shape["kv_heads"], shape["key_width"], shape.get("key_bits")),
            (
                shape.get("value_heads", shape["kv_heads"]),
                shape["value_width"],
                shape.get("value_bits"),
            ),
        )
    )
    return {"KV cache, bytes a token": f"{token_bytes:,}"}


def _record_facts(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "provenance"}


def _build_facts(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {"request": record["request"], "stages": record["stages"]}


def _checkpoint_facts(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    recipe = _read(folder / "recipe.json")
    forms: dict[str, int] = {}
    for group in record["groups"]:
        forms[group["form"]] = forms.get(group["form"], 0) + 1
    chosen = {name: recipe[name] for name in ("model", "dtype", "settings", "calibration")}
    if "recovery" in recipe:
        chosen["loss on held-out windows"] = recipe["recovery"]["loss"]
    return chosen | {"groups": forms} | record["totals"] | _cache_facts(record)


def _cache_facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a smaller cache takes; nothing for one as it is."""
    if "cache" not in record:
        return {}
    token_bytes = record["cache"]["token_bytes"]
    return {
        "KV cache, bytes a token": f"{token_bytes:,} of {record['cache']['dense_bytes']:,}",
        "tokens in 1 GB of it": f"{10**9 // max(1, token_bytes):,}",
    }


def _model_facts(what: str, trust_remote_code: bool) -> dict[str, Any]:
    """Architecture and groups of a model that is not compressed; loads it."""
    from pipeline.model.task import adapter_of, task_of_model

    facts: dict[str, Any] = adapter_of(task_of_model(what), "inspect")(what, trust_remote_code)
    return facts
