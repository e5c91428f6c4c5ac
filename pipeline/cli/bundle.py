"""`skipcat bundle SOURCE -o BUNDLE`: what runs a model on a board, and what proves it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.errors import UsageError
from pipeline.export.contract import DEFAULT_MAX_LENGTH

# Of JetPacks by name; `pipeline.bundle.jetpack` says what they are, and imports more.
_JETPACKS = ("6.1", "6.2", "7.2")
_MANIFEST = "manifest.json"


@click.command("bundle")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--onnx",
    "onnx_folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Of an engine: the export that it was built from, by which ONNX Runtime gives the "
    "expected answers. Not with a checkpoint.",
)
@click.option(
    "--device",
    metavar="NAME|JSON",
    help="The board: with a checkpoint a name such as orin-nano-8gb, of `skipcat bench "
    "--predict`, or the output of `skipcat-device describe`; with an engine that output alone, "
    "which it has to fit.",
)
@click.option(
    "--jetpack",
    type=click.Choice(_JETPACKS),
    help="Of the board; decides the graph. With a checkpoint alone, which needs it.",
)
@options.setting(
    "--max-length",
    DEFAULT_MAX_LENGTH,
    "With a checkpoint: slots of the cache, prompt and answer together.",
    options.positive,
)
@options.setting("--max-batch", 1, "With a checkpoint: most sequences at once.", options.positive)
@options.setting(
    "--max-prefill", 1024, "With a checkpoint: most tokens of one call.", options.positive
)
@click.option(
    "--plugin",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="LIB",
    help="With a checkpoint: the block-skip library, compiled on such a board; the bundle has its "
    "sources in any case.",
)
@click.option(
    "--wheels",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="With a checkpoint: wheels of numpy, tokenizers, jinja2 and markupsafe for the board's "
    "Python, for a board without a network; where one is missing, the error has the command that "
    "downloads them.",
)
@options.output
@options.own_threads
@options.overwrite
@options.trust_remote_code
@options.json_output
def command(
    source: Path,
    onnx_folder: Path | None,
    device: str | None,
    jetpack: str | None,
    max_length: int,
    max_batch: int,
    max_prefill: int,
    plugin: Path | None,
    wheels: Path | None,
    output: Path,
    overwrite: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Pack a checkpoint, or an engine of standard TensorRT, for a board.

    The bundle holds the program `skipcat-device`, which needs no torch, the tokens that ONNX
    Runtime answers with, and the hash of every file. Of a checkpoint it holds the graph for that
    JetPack, of which `skipcat-device build` makes the engine on the board; of an engine that one,
    for boards like the one that built it. `skipcat-device selftest` there compares.
    """
    from pipeline.progress import waiting

    with waiting(f"packing {output.name}"):
        if (source / _MANIFEST).is_file():
            other = jetpack or plugin or wheels
            record = _of_engine(source, onnx_folder, device, other, output, overwrite)
        else:
            chosen = {
                "max_length": max_length,
                "max_batch": max_batch,
                "max_prefill": max_prefill,
                "plugin": plugin,
                "wheels": wheels,
                "trust_remote_code": trust_remote_code,
            }
            record = _of_checkpoint(source, onnx_folder, device, jetpack, chosen, output, overwrite)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    print(f"{output}: {len(record['files'])} files, {_what_is_needed(record)}")


def _of_engine(
    source: Path,
    onnx_folder: Path | None,
    device: str | None,
    other: object,
    output: Path,
    overwrite: bool,
) -> dict[str, Any]:
    """Pack an engine with its proof; of what belongs to a checkpoint there may be nothing."""
    from pipeline.bundle.write import write_bundle
    from pipeline.json_file import read_json_object

    if onnx_folder is None:
        raise UsageError(
            "The expected answers come from the export that the engine was built from.",
            change="pass --onnx ONNX_FOLDER",
        )
    if other:
        raise UsageError(
            "An engine is for the TensorRT and with the plugin that it was built with.",
            observed=other,
            change="leave --jetpack, --plugin and --wheels out, or bundle a checkpoint",
        )
    described = None if device is None else read_json_object(Path(device))
    return write_bundle(source, onnx_folder, output, described, overwrite=overwrite)


def _of_checkpoint(
    source: Path,
    onnx_folder: Path | None,
    device: str | None,
    jetpack: str | None,
    chosen: dict[str, Any],
    output: Path,
    overwrite: bool,
) -> dict[str, Any]:
    """Pack what an engine is built from."""
    from pipeline.bench.described import find_boards
    from pipeline.bundle.jetpack import JETPACKS
    from pipeline.bundle.write import CheckpointBundle, bundle_checkpoint

    if onnx_folder is not None:
        raise UsageError(
            "A checkpoint is exported for the board's TensorRT.",
            where="--onnx",
            change="leave --onnx out, or bundle an engine",
        )
    if device is None or jetpack is None:
        raise UsageError(
            "A checkpoint is packed for a board.",
            expected="--device and --jetpack",
            change="such as --device orin-nano-8gb --jetpack 6.2",
        )
    request = CheckpointBundle(JETPACKS[jetpack], find_boards(device), **chosen)
    return bundle_checkpoint(source, output, request, overwrite=overwrite)


def _what_is_needed(record: dict[str, Any]) -> str:
    """What running takes, as the plan says or as it is expected."""
    if "needed_bytes" in record:
        return f"needs about {sum(record['needed_bytes'].values()) / 1e9:.2f} GB of memory to run"
    row = record["predicted"]["rows"][0]
    run, speed = row["run_bytes"], row["tokens_per_s"]
    return (
        f"expected on {row['device']}, not measured: {run['low'] / 1e9:.2f} to "
        f"{run['high'] / 1e9:.2f} GB of memory ({row['verdict']}), {speed['low']:.0f} to "
        f"{speed['high']:.0f} tokens/s; next: copy it there, python3 skipcat-device build ."
    )
