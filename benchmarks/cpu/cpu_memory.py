"""Peak memory of the CPU session at 2,048 tokens against weights and cache, for models of any size.

    python -m benchmarks.stages.random_llama llama-1b --layers 16 --hidden 2048 ...
    skipcat export llama-1b -o llama-1b-int8 --profile cpu
    python -m benchmarks.cpu.cpu_memory cpu-int8 llama-1b-int8

Each folder is an export of the profile `cpu`, opened in a process of its own, which reads a prompt
of random tokens and generates 15; the peak is the process's own, as the kernel counted it. Random
tokens touch more of the embedding than text does. `fixed` is what the same process had before it
opened the model: Python, NumPy and ONNX Runtime.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.cpu.generation import CONTEXT, Engine, make_engines
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.bench.targets import traffic_of_folder
from pipeline.export.record import read_export_record
from pipeline.progress import note, result_console
from pipeline.provenance import provenance

_SCHEMA = 1
_RESULT = RESULTS / "cpu_memory.json"
_TARGET = 1.3


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(folders: tuple[Path, ...], threads: int, result: Path) -> None:
    """Measure every folder, one after the other."""
    loads = [load_average()]
    rows = [_measure(folder, threads) for folder in folders]
    record = {
        "schema": _SCHEMA,
        "machine": describe_machine() | {"threads": threads},
        "provenance": provenance(),
        "settings": {"context": CONTEXT},
        "load_average": [*loads, load_average()],
        "rows": rows,
    }
    write_json(result, record)
    _show(rows)


def _measure(folder: Path, threads: int) -> dict[str, Any]:
    """Bytes of weights, cache and peak of one folder."""
    weights = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    cache = traffic_of_folder(folder).cache_bytes(CONTEXT)
    exported = read_export_record(folder)
    ids = np.random.default_rng(0).integers(0, exported.vocab_size, CONTEXT - 16)
    (engine,) = make_engines((str(folder),), (), None, None, threads)
    engine.start()
    engine.ask(do="generate", ids=ids.tolist(), new=15)
    peak = engine.peak_bytes()
    engine.stop()
    note(f"{folder.name}: {peak / 1e6:.0f} MB")
    return {
        "folder": folder.name,
        "weights": exported.weights,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "fixed_bytes": _fixed_bytes(),
        "peak_bytes": peak,
        "ratio": peak / (weights + cache),
    }


def _fixed_bytes() -> int:
    """Peak of a process that imports what the session imports, and opens nothing."""
    code = (
        "import sys, onnxruntime, numpy, pipeline.runtime.sessions.onnx_cpu_session; "
        "print(1, flush=True); sys.stdin.read()"
    )
    empty = Engine("nothing", [sys.executable, "-c", code], True)
    empty.start()
    peak = empty.peak_bytes()
    empty.stop()
    return peak


def _show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("folder", "weights", "MB", "cache MB", "fixed MB", "peak MB", "peak / (w + c)")
    for row in rows:
        megabytes = (
            f"{row[key] / 1e6:.0f}"
            for key in ("weight_bytes", "cache_bytes", "fixed_bytes", "peak_bytes")
        )
        ratio = f"{row['ratio']:.2f}" + ("" if row["ratio"] <= _TARGET else " !")
        table.add_row(row["folder"], row["weights"], *megabytes, ratio)
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
