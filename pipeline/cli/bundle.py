"""`skipcat bundle ENGINE --onnx ONNX_FOLDER -o BUNDLE`: an engine with what runs and proves it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.cli import options


@click.command("bundle")
@click.argument("engine", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--onnx",
    "onnx_folder",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The export that the engine was built from: ONNX Runtime gives the expected answers.",
)
@click.option(
    "--device",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="JSON",
    help="Refuse a bundle that does not fit this board: the output of `skipcat-device describe`.",
)
@options.output
@options.own_threads
@options.overwrite
@options.json_output
def command(
    engine: Path,
    onnx_folder: Path,
    device: Path | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Pack an engine of standard TensorRT for boards like the one that built it.

    The bundle holds the engine, the program `skipcat-device`, which needs no torch, the tokens that
    ONNX Runtime answers with, and the hash of every file; `skipcat-device selftest` there compares.
    """
    from pipeline.bundle.write import write_bundle
    from pipeline.json_file import read_json_object
    from pipeline.progress import waiting

    described = None if device is None else read_json_object(device)
    with waiting(f"packing {output.name}"):
        record = write_bundle(engine, onnx_folder, output, described, overwrite=overwrite)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    needed = sum(record["needed_bytes"].values()) / 1e9
    print(f"{output}: {len(record['files'])} files, needs about {needed:.2f} GB of memory to run")
