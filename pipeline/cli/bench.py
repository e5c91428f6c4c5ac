"""`skipcat bench FOLDER`: how fast it decodes, here or, predicted, on another device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.bench.targets import Target

positive = click.IntRange(min=1)
SHAPE_DTYPES = ("bfloat16", "float16", "float32", "int8", "int4", "nvfp4")
MEASURED_DTYPES = SHAPE_DTYPES[:3]
new_file = click.Path(path_type=Path, dir_okay=False)

model_options = options.apply(
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        help="Architecture with random weights, such as llama-3.2-1b; repeatable.",
    ),
    click.option(
        "--keep-params",
        default="1",
        show_default=True,
        help="Of --shape: fractions of the linear parameters to keep, such as 1,0.8,0.6.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(SHAPE_DTYPES),
        default="bfloat16",
        show_default=True,
        help="Of --shape; those below 16 bits can only be predicted.",
    ),
)
measuring_options = options.apply(
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="Where the models run: exports on cpu, engines on cuda, checkpoints on either; auto: "
        "cuda for engines, cpu for all else.",
    ),
    click.option(
        "--prompt-tokens",
        type=positive,
        default=128,
        show_default=True,
        help="Tokens read at once (prefill).",
    ),
    click.option(
        "--new-tokens",
        type=positive,
        default=64,
        show_default=True,
        help="Tokens fed one by one (decoding).",
    ),
    click.option(
        "--context",
        type=positive,
        help="Tokens in the cache before the first new one.  [--prompt-tokens]",
    ),
    click.option(
        "--rounds",
        type=positive,
        default=3,
        show_default=True,
        help="Turns of every model, after one that warms up.",
    ),
    click.option("--threads", type=positive, help="Of the CPU.  [all cores]"),
)
output_options = options.apply(
    click.option("--json", "json_file", type=new_file, help="File for the figures."),
    click.option("--plot", type=new_file, help="File for the roofline, an SVG."),
    click.option("-v", "--verbose", is_flag=True, help="Say on stderr what each turn measured."),
)


@click.command("bench")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@model_options
@click.option("--predict", metavar="DEVICES", help="Do not measure; predict for these devices.")
@measuring_options
@output_options
def command(
    folders: tuple[Path, ...],
    shapes: tuple[str, ...],
    keep_params: str,
    dtype: str,
    predict: str | None,
    json_file: Path | None,
    plot: Path | None,
    verbose: bool,
    **settings: Any,
) -> None:
    """Measure prefill and decode of the models in FOLDERS, against the bandwidth of the memory.

    A FOLDER is what `skipcat run` takes. Each model gets a process of its own; they take turns.

    \b
      skipcat bench build/checkpoint build/onnx --plot roofline.svg
      skipcat bench --shape llama-3.2-1b --keep-params 1,0.6
      skipcat bench build/onnx-fp16 --predict orin-nano-8gb,rtx-4090
    """  # noqa: D301 - click reads the escape
    require_places(json_file, plot)
    if predict is None and shapes and dtype not in MEASURED_DTYPES:
        raise UsageError(
            "Weights of that type can only be predicted.",
            where="--dtype",
            observed=dtype,
            expected=", ".join(MEASURED_DTYPES),
            change="pass --predict, or quantise a model and give its folder",
        )
    from pipeline.bench.devices import find_devices

    devices = find_devices(predict) if predict is not None else []
    targets = find_targets(folders, shapes, dtype, fractions(keep_params))
    if devices:
        context = settings["context"] or settings["prompt_tokens"]
        record = predicted_record(targets, devices, context)
    else:
        record = measured_record(targets, verbose, **settings)
    write_results(record, json_file, plot)


def require_places(*paths: Path | None) -> None:
    """Raise UsageError for a file in a folder that is not there, before hours are spent."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError("There is no such folder to write to.", where=path)


def fractions(text: str) -> list[float]:
    """Kept fractions, separated by commas; their range is checked where they are used."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            "The kept fractions cannot be read.",
            where="--keep-params",
            observed=text,
            expected="numbers in (0, 1], such as 1,0.8",
        ) from error


def find_targets(
    folders: tuple[Path, ...], shapes: tuple[str, ...], dtype: str, kept: list[float]
) -> list[Target]:
    """All that was named, checked and counted."""
    if not folders and not shapes:
        raise UsageError("There is nothing to measure.", change="name a folder, or a --shape")
    from pipeline.bench.targets import folder_target, shape_targets

    found = [target for name in shapes for target in shape_targets(name, dtype, kept)]
    return [*(folder_target(folder) for folder in folders), *found]


def measured_record(
    targets: list[Target], verbose: bool, *, context: int | None, threads: int | None, **rest: Any
) -> dict[str, Any]:
    """Measure, and print the table."""
    from pipeline.bench.measure import Settings, measure
    from pipeline.bench.report import measured_table
    from pipeline.machine import usable_cores
    from pipeline.progress import note, result_console

    prompt_tokens = rest["prompt_tokens"]
    if context is not None and context < prompt_tokens:
        raise UsageError(
            "The context includes the prompt.",
            where="--context",
            observed=context,
            expected=f"at least {prompt_tokens}, the prompt's tokens",
        )
    settings = Settings(context=context or prompt_tokens, threads=threads or usable_cores(), **rest)
    record = measure(targets, settings, note if verbose else lambda text: None)
    result_console().print(measured_table(record))
    busy = max(record["load_average"][0] - 0.5, 0)
    if busy > 0.5:
        note(f"other programs kept {busy:.1f} cores busy before this began: figures are too low")
    return record


def predicted_record(targets: list[Target], devices: list[Any], context: int) -> dict[str, Any]:
    """Predict, and print the table; the record says that nothing was measured."""
    from pipeline.bench import report
    from pipeline.bench.predict import check, fitted, predict
    from pipeline.bench.targets import require_length
    from pipeline.progress import note, result_console
    from pipeline.provenance import provenance

    require_length(targets, context, 1)
    fit, checked = fitted(), check()
    rows = [
        {"model": target.label}
        | target.what
        | asdict(predict(target.traffic, device, context, fit))
        | {"published_figures": report.checked_against(checked, device.name)}
        for target in targets
        for device in devices
    ]
    record = {
        "schema": 1,
        "kind": "prediction",
        "measured": False,
        "context": context,
        "provenance": provenance(),
        "devices": [asdict(device) | {"gb_per_s": device.gb_per_s} for device in devices],
        "check": checked,
        "rows": rows,
    }
    result_console().print(report.predicted_table(record))
    note(report.check_line(checked))
    return record


def write_results(record: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    """The files that were asked for."""
    from pipeline.artefact import write_json

    if json_file is not None:
        write_json(json_file, record)
    if plot is not None:
        from pipeline.bench.plot import write_measured, write_predicted

        write = write_measured if record["kind"] == "measurement" else write_predicted
        write(record, plot)
