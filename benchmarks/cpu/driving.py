"""A driving network in ONNX Runtime on the CPU: float32 against 8 bits, in turns.

    python -m benchmarks.cpu.driving FLOAT_ONNX INT8_ONNX --images FOLDER

Both are exports of `--profile cpu`. The same image goes through both, one after the other, at each
number of threads; the ratio is of the medians of one run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.driving.letterbox import Letterbox
from pipeline.errors import UsageError
from pipeline.provenance import provenance
from pipeline.runtime.sessions.driving_sessions import OnnxDriving

_RESULT = RESULTS / "driving_cpu.json"
_WAYS = ("float32", "int8")


@click.command()
@click.argument("float_onnx", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("int8_onnx", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--images", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--count", default=64, show_default=True, help="Images a row.")
@click.option("--threads", default=[1, 2], multiple=True, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    float_onnx: Path, int8_onnx: Path, images: Path, count: int, threads: list[int], result: Path
) -> None:
    """Time both at each number of threads."""
    files = sorted(images.glob("*.jpg"))[:count]
    if not files:
        raise UsageError("There are no images.", where=images, expected="*.jpg")
    rows = [_row({"float32": float_onnx, "int8": int8_onnx}, files, number) for number in threads]
    record = {"schema": 1, "machine": describe_machine(), "provenance": provenance(), "rows": rows}
    write_json(result, record)
    click.echo(json.dumps(rows, indent=2))


def _row(folders: dict[str, Path], files: list[Path], threads: int) -> dict[str, Any]:
    """Median milliseconds of the network by both, image after image."""
    sessions = {way: OnnxDriving(folders[way], way, threads) for way in _WAYS}
    before, ms = load_average(), {way: list[float]() for way in _WAYS}
    for file in files:
        pixels = _pixels(file, sessions["float32"].traits.size)
        for way in _WAYS:
            begun = time.perf_counter()
            sessions[way].maps(pixels)
            ms[way].append(1000 * (time.perf_counter() - begun))
    medians = {way: round(statistics.median(ms[way]), 3) for way in _WAYS}
    return {
        "threads": threads,
        "images": len(files),
        "ms": medians,
        "times_as_fast": round(medians["float32"] / medians["int8"], 3),
        "load_average": [before, load_average()],
    }


def _pixels(file: Path, size: tuple[int, int]) -> np.ndarray:
    """An image as the network takes it, float32 [1, 3, H, W]."""
    image = np.asarray(Image.open(file).convert("RGB"))
    laid = Letterbox.of((image.shape[0], image.shape[1]), size).image(image)
    return np.ascontiguousarray(laid.transpose(2, 0, 1)[None].astype(np.float32) / 255)


if __name__ == "__main__":
    sys.exit(run(command))
