"""What a stage loses beside other programs: alone, beside one busy core, and beside all of them.

    python -m benchmarks.stages.beside
    python -m benchmarks.stages.beside --rounds 3 --json beside.json

Each round runs a short compression and a long answer, with threads that wait as the commands let
them, and with threads that spin (OMP_WAIT_POLICY=active, as PyTorch comes). The load is started
here: processes that do nothing but count. On an idle machine, fair sharing gives a command of as
many threads as cores 1 + busy / cores of its time alone.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks import RESULTS
from benchmarks.command import SKIPCAT, run
from benchmarks.stages.measured_command import run_measured
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine
from pipeline.child_process import environment
from pipeline.machine import usable_cores
from pipeline.progress import note
from pipeline.provenance import provenance

_SCHEMA = 1
_WAYS: dict[str, dict[str, str]] = {"shipped": {}, "spinning": {"OMP_WAIT_POLICY": "active"}}
_COMPRESS = ("compress", "-m", "smollm2-135m", "--effort", "fast", "--windows", "8", "--overwrite")
_ANSWER = ("-p", "Tell me all about whales.", "--max-new-tokens", "256", "--temperature", "0.8",
           "--seed", "1")  # fmt: skip


@contextlib.contextmanager
def _busy(processes: int) -> Iterator[None]:
    """So many processes that each keep a core busy."""
    counting = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(counting) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def _commands(work: Path) -> dict[str, list[str]]:
    """What is timed, by name; the answer's export is made first."""
    exported = work / "cpu"
    if not exported.exists():
        export = ["export", "smollm2-135m", "-o", str(exported), "--profile", "cpu"]
        subprocess.run([*SKIPCAT, *export, "--weights", "int8"], check=True)
    return {
        "compress": [*SKIPCAT, *_COMPRESS, "-o", str(work / "checkpoint")],
        "answer": [*SKIPCAT, "run", str(exported), *_ANSWER],
    }


def _measure(work: Path, rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """One row for each command, way and load: the median of the rounds, which go in turns."""
    commands = {name: command for name, command in _commands(work).items() if name in names}
    loads = (0, 1, usable_cores())
    seconds: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(rounds):
        for name, command in commands.items():
            for busy in loads:
                for way, chosen in _WAYS.items():
                    note(f"[{turn + 1}/{rounds}] {name}, {way}, beside {busy}")
                    with _busy(busy):
                        cost = run_measured(command, work / "log.txt", environment() | chosen)
                    seconds.setdefault((name, way, busy), []).append(cost.seconds)
    return [
        {
            "command": name,
            "waiting": way,
            "busy": busy,
            "seconds": taken,
            "ratio": statistics.median(taken) / statistics.median(seconds[name, way, 0]),
        }
        for (name, way, busy), taken in seconds.items()
    ]


@click.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--only", default="compress,answer", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Kept, and taken up again.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULTS / "beside.json")
def main(rounds: int, only: str, work: Path | None, result: Path) -> None:
    """Measure, and write the JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        rows = _measure(work or Path(temporary), rounds, only.split(","))
    made = {"schema": _SCHEMA, "rows": rows, "machine": describe_machine()}
    write_json(result, made | {"provenance": provenance()})
    for row in rows:
        note(
            f"{row['command']:9} {row['waiting']:9} beside {row['busy']}: "
            f"{statistics.median(row['seconds']):6.1f} s, {row['ratio']:.2f} of alone"
        )


if __name__ == "__main__":
    run(main)
