"""`skipcat bench` of the default model: dense and compressed, PyTorch and ONNX Runtime, on the CPU.

    python -m benchmarks.cpu.bench_default --calibration VALID.txt --work DIR

Makes in DIR what is not there yet: the default model as a folder (`dense`), the same compressed
(`checkpoint`), and the exports of both for ONNX Runtime in float32 (`dense-onnx`, `onnx`) and in
int8 (`dense-cpu`, `cpu`). Then all six take turns in one run of `skipcat bench`, whose record goes
to `results/bench_default.json`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import torch

from benchmarks import RESULTS
from benchmarks.command import SKIPCAT, run
from pipeline.artefact import staged_folder
from pipeline.child_process import environment
from pipeline.model.load import load_model

RESULT = RESULTS / "bench_default.json"
MODEL = "smollm2-135m"
EXPORTS = {"onnx": "opset24", "cpu": "cpu"}


def skipcat(*arguments: str | Path) -> None:
    """Run a command in a process of its own; its failure ends this one with the same status."""
    command = [*SKIPCAT, *map(str, arguments)]
    status = subprocess.run(command, check=False, env=environment()).returncode
    if status != 0:
        raise click.exceptions.Exit(status)


def save_dense(folder: Path) -> None:
    """The default model, float32, as an ordinary folder."""
    loaded = load_model(MODEL, dtype=torch.float32)
    with staged_folder(folder, overwrite=False) as staged:
        loaded.model.save_pretrained(staged)
        loaded.tokenizer.save_pretrained(staged)


def make_folders(work: Path, keep_params: float, calibration: str) -> list[Path]:
    """The six folders, in the order of the table; those that are there stay as they are."""
    dense, compressed = work / "dense", work / "checkpoint"
    if not dense.is_dir():
        save_dense(dense)
    if not compressed.is_dir():
        kept = ("--keep-params", str(keep_params), "--effort", "fast")
        skipcat("compress", "-m", MODEL, "-o", compressed, *kept, "--calibration", calibration)
    folders = [dense, compressed]
    for name, profile in EXPORTS.items():
        for checkpoint, output in ((dense, work / f"dense-{name}"), (compressed, work / name)):
            if not output.is_dir():
                skipcat("export", checkpoint, "-o", output, "--profile", profile)
            folders.append(output)
    return folders


@click.command()
@click.option("--calibration", required=True, help="Text file, as of `skipcat compress`.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--keep-params", type=float, default=0.8, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULT)
def command(calibration: str, work: Path, keep_params: float, rounds: int, result: Path) -> None:
    """Make what is missing, measure, print the table, and write the JSON."""
    work.mkdir(parents=True, exist_ok=True)
    folders = make_folders(work, keep_params, calibration)
    threads = str(len(os.sched_getaffinity(0)))
    arguments = ("--rounds", str(rounds), "--threads", threads, "--json", result)
    skipcat("bench", *folders, *arguments, "--plot", result.with_suffix(".svg"), "--verbose")


if __name__ == "__main__":
    sys.exit(run(command))
