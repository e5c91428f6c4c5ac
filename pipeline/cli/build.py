"""`skipcat build`: every stage in order, and a short table at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.cli.compress import compression_options
from pipeline.export.contract import DEFAULT_MAX_LENGTH
from pipeline.json_file import read_json_object

if TYPE_CHECKING:
    from pipeline.build import Build
    from pipeline.compress.request import CompressRequest
    from validate.record import Ledger


_evaluation_options = options.apply(
    options.setting(
        "--eval-text",
        "self",
        "Text for the ledger: a file, or 'self': text that the original generates.",
    ),
    options.setting("--eval-windows", 16, "Windows of that text.", options.positive),
    options.setting("--eval-length", 256, "Tokens in each.", options.positive),
    heading="Evaluation",
)


@click.command("build", cls=options.GroupedCommand, rest="Model, output and run")
@options.model
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write; by default artefacts/<model>-keep<fraction>.",
)
@options.setting(
    "--target",
    "auto",
    "GPU to build an engine for: auto, sm86, sm89, tensorrt, ... (see skipcat doctor); cpu "
    "builds none.",
)
@compression_options
@options.setting("--max-length", DEFAULT_MAX_LENGTH, "Cache length.", options.positive)
@_evaluation_options
@options.trust_remote_code
@options.own_threads
@options.workers
@options.overwrite
@options.resume
@options.json_output
def command(
    output: Path | None,
    target: str,
    max_length: int,
    eval_text: str,
    eval_windows: int,
    eval_length: int,
    workers: str | None,
    overwrite: bool,
    resume: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compress, export to ONNX, build a TensorRT engine, validate every stage.

    \b
    skipcat build -m smollm2-135m --keep-params 0.8
    skipcat build -m ./my-llama --target sm89 --calibration valid.txt --eval-text test.txt
    skipcat build -m smollm2-135m --memory 70MB --target cpu
    """  # noqa: D301 - click reads the escape
    from pipeline.build import BuildRequest, build
    from pipeline.compress.request import CompressRequest
    from pipeline.model.source import resolve_source

    compress = CompressRequest(**settings)
    compress.check()
    folder = output or _default_folder(resolve_source(compress.model).label, compress)
    request = BuildRequest(compress, target, max_length, eval_text, eval_windows, eval_length)
    state, _, ledger = build(request, folder, overwrite=overwrite, resume=resume, workers=workers)
    if as_json:
        record = read_json_object(folder / "build.json")
        click.echo(json.dumps(record | {"ledger": ledger.to_json()}, indent=2))
    else:
        _show(state, ledger)
    ledger.require_passed()


def _default_folder(label: str, compress: CompressRequest) -> Path:
    """artefacts/smollm2-135m-keep0.8, or what the budget of bytes or the format says."""
    budgets = {"": compress.memory, "keep-bytes": compress.keep_bytes}
    budget = next((f"{name}{value}" for name, value in budgets.items() if value is not None), None)
    kept = budget or f"keep{compress.keep_params:g}"
    parts = (label, kept.replace(" ", ""), compress.weights)
    return Path("artefacts") / "-".join(part for part in parts if part)


def _show(state: Build, ledger: Ledger) -> None:
    """What was made, how large it is, how near to the original, and what to do next."""
    from rich.table import Table

    from pipeline.progress import result_console
    from validate.report import answers_text, build_table

    folder = state.folder
    console = result_console()
    report = read_json_object(folder / "checkpoint" / "report.json")
    totals = report["totals"]
    table = Table(title=f"{state.request.compress.model} -> {folder}")
    for heading in ("stage", "folder", "MB", "seconds", "peak MB so far"):
        table.add_column(heading, justify="left" if heading in ("stage", "folder") else "right")
    for name, stage in state.stages.items():
        table.add_row(
            name,
            stage["folder"] + "/",
            f"{stage['bytes'] / 1e6:.1f}",
            f"{stage['seconds']:.0f}",
            f"{stage['peak_bytes'] / 1e6:.0f}",
        )
    console.print(table)
    click.echo(
        f"decoder linear parameters kept: {totals['kept_fraction']:.1%} "
        f"({totals['dense_parameters']:,} -> {totals['kept_parameters']:,}); "
        f"all parameters {totals['total_before']:,} -> {totals['total_after']:,}; "
        f"{totals['factored']} groups factored, {totals['kept_dense']} kept dense; "
        f"largest |A'| {totals['largest']:.3f}"
    )
    if totals["in_few_bits"]:
        click.echo(f"weights on disk: {totals['stored_bytes'] / 1e6:.2f} MB")
    console.print(build_table(ledger))
    if answers := answers_text(ledger):
        click.echo(answers)
    click.echo(f"report: {folder / 'ledger' / 'ledger.html'}")
    runs = "onnx-cpu" if (folder / "onnx-cpu").exists() else "onnx"
    click.echo(options.what_next(f'run {folder / runs} -p "What is a low-rank matrix?"'))
