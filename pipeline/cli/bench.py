"""`skipcat bench FOLDER`: how fast it decodes, here or, predicted, on another device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.cli.bench_drafts import measured_drafting
from pipeline.cli.bench_predicted import predicted_record
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.bench.targets import BenchTarget

_SHAPE_DTYPES = ("bfloat16", "float16", "float32", "int8", "int4", "nvfp4", "q4_k_m", "q8_0")
_MEASURED_DTYPES = _SHAPE_DTYPES[:3]
_new_file = click.Path(path_type=Path, dir_okay=False)

_model_options = options.apply(
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        help="Architecture with random weights, such as llama-3.2-1b; repeatable.",
    ),
    options.setting(
        "--keep-params",
        "1",
        "Of --shape: fractions of the linear parameters to keep, such as 1,0.8,0.6.",
    ),
    options.setting(
        "--dtype",
        "bfloat16",
        "Of --shape; those below 16 bits can only be predicted.",
        click.Choice(_SHAPE_DTYPES),
    ),
)
_measuring_options = options.apply(
    options.setting(
        "--device",
        "auto",
        "Where the models run: exports on cpu, engines on cuda, checkpoints on either; auto: "
        "cuda for engines, cpu for all else.",
        click.Choice(["auto", "cpu", "cuda"]),
    ),
    options.setting("--prompt-tokens", 128, "Tokens read at once (prefill).", options.positive),
    options.setting("--new-tokens", 64, "Tokens fed one by one (decoding).", options.positive),
    click.option(
        "--context",
        type=options.positive,
        help="Tokens in the cache before the first new one.  [--prompt-tokens]",
    ),
    options.setting(
        "--rounds", 3, "Turns of every model, after one that warms up.", options.positive
    ),
    click.option("--threads", type=options.thread_count, help="Of the CPU.  [all cores]"),
)
_drafting_options = options.apply(
    click.option(
        "--draft",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="An export in fewer bytes that drafts for the one FOLDER: answers plain and drafted, "
        "and of the draft alone, in turns. Not with --shape, --predict, --device cuda, --plot, "
        "--prompt-tokens or --context.",
    ),
    click.option(
        "--memory",
        metavar="BYTES",
        help="With --draft: of a checkpoint, what it may take, as of `skipcat run`.",
    ),
    click.option(
        "--draft-tokens", type=options.count, help="With --draft: of every draft.  [what pays]"
    ),
    click.option(
        "--draft-width",
        type=options.positive,
        help="With --draft: most guesses at one place of an answer; 1 drafts chains, more are for "
        "--memory.  [trees with --memory, else chains]",
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="With --draft: a prompt a line.  [three of its own]",
    ),
)
_output_options = options.apply(
    click.option("--json", "json_file", type=_new_file, help="File for the figures."),
    click.option("--plot", type=_new_file, help="File for the roofline, an SVG."),
    click.option("-v", "--verbose", is_flag=True, help="Say on stderr what each turn measured."),
)


@click.command("bench")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@_model_options
@click.option(
    "--predict",
    metavar="DEVICES",
    help="Do not measure; predict for these devices: orin-nano-8gb, orin-nano-8gb@25w in a power "
    "mode, orin-nano-8gb@all in all of them, or board.json of `skipcat-device describe`.",
)
@_measuring_options
@_drafting_options
@_output_options
def command(
    folders: tuple[Path, ...],
    shapes: tuple[str, ...],
    keep_params: str,
    dtype: str,
    predict: str | None,
    draft: Path | None,
    memory: str | None,
    draft_tokens: int | None,
    draft_width: int | None,
    prompts: Path | None,
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
      skipcat bench build/onnx-fp16 --predict orin-nano-8gb@all,rtx-4090
      skipcat bench ./my-llama --draft small --memory 1GB --json drafted.json
    """  # noqa: D301 - click reads the escape
    _require_places(json_file, plot)
    given: dict[str, Any] = {"memory": memory, "draft_tokens": draft_tokens, "prompts": prompts}
    given["draft_width"] = draft_width
    if draft is not None or any(value is not None for value in given.values()):
        record = measured_drafting(folders, draft, verbose=verbose, **given)
        _write_results(record, json_file, None)
        return
    if predict is None and shapes and dtype not in _MEASURED_DTYPES:
        raise UsageError(
            "Weights of that type can only be predicted.",
            where="--dtype",
            observed=dtype,
            expected=", ".join(_MEASURED_DTYPES),
            change="pass --predict, or quantise a model and give its folder",
        )
    from pipeline.bench.described import find_boards

    devices = find_boards(predict) if predict is not None else []
    targets = _find_targets(folders, shapes, dtype, _fractions(keep_params))
    if devices:
        context = settings["context"] or settings["prompt_tokens"]
        record = predicted_record(targets, devices, context)
    else:
        record = _measured_record(targets, verbose, **settings)
    _write_results(record, json_file, plot)
    if devices:
        from pipeline.bench.predict import require_a_fit

        require_a_fit(record)


def _require_places(*paths: Path | None) -> None:
    """Raise UsageError for a file that cannot be written, before hours are spent."""
    from pipeline.output import check_output_file

    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError("There is no such folder to write to.", where=path)
        if path is not None:
            check_output_file(path, overwrite=True)


def _fractions(text: str) -> list[float]:
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


def _find_targets(
    folders: tuple[Path, ...], shapes: tuple[str, ...], dtype: str, kept: list[float]
) -> list[BenchTarget]:
    """All that was named, checked and counted."""
    if not folders and not shapes:
        raise UsageError("There is nothing to measure.", change="name a folder, or a --shape")
    from pipeline.bench.targets import BenchTarget

    found = [target for name in shapes for target in BenchTarget.of_shape(name, dtype, kept)]
    return [*(BenchTarget.of_folder(folder) for folder in folders), *found]


def _measured_record(
    targets: list[BenchTarget],
    verbose: bool,
    *,
    context: int | None,
    threads: int | None,
    **rest: Any,
) -> dict[str, Any]:
    """Measure, and print the table."""
    from pipeline.bench.measure import Settings, measure
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
    result_console().print(_measured_table(record))
    busy = max(record["load_average"][0] - 0.5, 0)
    if busy > 0.5:
        note(f"other programs kept {busy:.1f} cores busy before this began: figures are too low")
    return record


def _write_results(record: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    """The files that were asked for."""
    from pipeline.artefact import write_json

    if json_file is not None:
        write_json(json_file, record)
    if plot is not None:
        from pipeline.bench.plot import write_plot

        write_plot(record, plot)


def _measured_table(record: dict[str, Any]) -> Table:
    """One row a model; tokens/s as median and extremes over the rounds."""
    from rich.table import Table

    settings, bandwidth = record["settings"], record["bandwidth"]
    read = bandwidth["bytes_per_s"]
    table = Table(
        title=f"measured on {_where(record)}: {settings['prompt_tokens']} tokens read at once, "
        f"then {settings['new_tokens']} one by one from {settings['context']} on; memory "
        f"{_giga(read['median'])} GB/s ({_giga(read['min'])} to {_giga(read['max'])}), "
        f"{bandwidth['method']}",
        title_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("session")
    for heading in (
        "prefill\ntokens/s", "decode\ntokens/s", "lowest to\nhighest", "ms a\ntoken",
        "MB read\na token", "GB/s", "of the\nmemory's", "peak\nMB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in record["rows"]:
        table.add_row(*_measured_cells(row))
    return table


def _measured_cells(row: dict[str, Any]) -> Sequence[str]:
    """The cells of one model."""
    decode = row["decode_tokens_per_s"]
    peak = _mega(row["peak_bytes"])
    if row["peak_device_bytes"]:
        peak += f"\n+ {_mega(row['peak_device_bytes'])} GPU"
    return (
        row["model"],
        row["session"],
        f"{row['prefill_tokens_per_s']['median']:,.0f}",
        f"{decode['median']:,.1f}",
        f"{decode['min']:,.1f} to {decode['max']:,.1f}",
        f"{row['token_ms']:.2f}",
        f"{row['bytes_per_token'] / 1e6:,.1f}",
        _giga(row["bytes_per_s"]),
        f"{row['bandwidth_share']:.0%}",
        peak,
    )


def _where(record: dict[str, Any]) -> str:
    """The device of a measurement, by name."""
    machine, settings = record["machine"], record["settings"]
    if settings["device"] == "cuda" and isinstance(machine["gpus"], list):
        return str(machine["gpus"][0]["name"])
    return f"{machine['cpu']}, {settings['threads']} threads"


def _giga(value: float) -> str:
    """In units of 10^9."""
    return f"{value / 1e9:.1f}"


def _mega(value: float) -> str:
    """In units of 10^6."""
    return f"{value / 1e6:,.0f}"
