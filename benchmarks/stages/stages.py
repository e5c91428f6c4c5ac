r"""Time, memory and disk of every stage, each run as a user runs it, against the targets.

    python -m benchmarks.stages.stages
    python -m benchmarks.stages.stages --only compress,export-float32 --work /tmp/stages

Every row is one `skipcat` command in a process of its own. `--work` keeps the artefacts, and later
runs with the same folder start from them. Rows that are not measured again stay in the JSON, each
with the commit and the load average it was measured at.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import SKIPCAT, run
from benchmarks.stages.measured_command import Cost, run_measured
from pipeline.artefact import folder_bytes, write_json
from pipeline.bench.measure import describe_machine
from pipeline.child_process import environment
from pipeline.progress import note, result_console
from pipeline.provenance import provenance

_SCHEMA = 1
_RESULT = RESULTS / "stages.json"
_CALIBRATION = ("--effort", "fast")
_WORDS = 80_000
_ITEM_BYTES = {"float32": 4, "float16": 2}
_DEPTHS = (4, 8, 16)
_WIDE_DEPTHS = (1, 2)
# Llama-2-7B but for its depth, and no more text than its widest input needs.
_WIDE = ("--hidden", "4096", "--intermediate", "11008", "--head-width", "128", "--vocab", "32000",
        "--dtype", "bfloat16")  # fmt: skip
# Streamed, as a whole Llama-2-7B would be here: few layers of it would fit memory.
_WIDE_CALIBRATION = ("--effort", "fast", "--windows", "24", "--dtype", "bfloat16",
                    "--stream-weights")  # fmt: skip
_WIDE_METHOD = "skipcat"
# Eight times narrower, so that many layers take minutes.
_STREAMED_DEPTHS = (4, 8, 16)
_STREAMED = ("--hidden", "512", "--intermediate", "1376", "--dtype", "bfloat16")
# One layer's activations of all calibration tokens, in float32, at the width of random_llama.py:
# less than this is no leak of one layer's worth.
_LAYER_ACTIVATION_BYTES = 64 * 512 * 256 * 4
_GIGABYTE = 1e9
_MEGABYTE = 1e6


@dataclass(frozen=True)
class _Figure:
    """One measured number.

    Attributes:
        what: what it is, with its unit.
        value: the number.
        target: most it may be; None where nothing is promised.
    """

    what: str
    value: float
    target: float | None = None

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL`, or a dash where nothing is promised."""
        if self.target is None:
            return "-"
        return "pass" if self.value <= self.target else "FAIL"


@dataclass
class _Bench:
    """Where the artefacts of a run lie, and what it runs on."""

    work: Path
    model: str
    calibration: Path

    def path(self, stage: str) -> Path:
        """The folder that a stage writes."""
        return self.work / stage

    def run(self, stage: str, *arguments: str) -> Cost:
        """Run a command that writes the stage's folder, and measure it."""
        shutil.rmtree(self.path(stage), ignore_errors=True)
        command = [*SKIPCAT, *arguments, "-o", str(self.path(stage))]
        return run_measured(command, self.work / f"{stage}.log", self.environment())

    def environment(self) -> dict[str, str]:
        """That of this process, with this checkout first and no hub."""
        return environment(HF_HUB_OFFLINE="1")

    def need(self, stage: str) -> Path:
        """The folder of an earlier stage; made now, unmeasured, if it is not there."""
        if not self.path(stage).exists():
            note(f"  first {stage}, which this needs")
            _STAGES[stage](self)
        return self.path(stage)


@dataclass(frozen=True)
class _Row:
    """What measuring a stage gave."""

    figures: list[_Figure]
    cost: Cost
    details: dict[str, Any] = field(default_factory=dict)


def _compress(bench: _Bench) -> _Row:
    """`skipcat compress`, `--effort fast` (64 x 512 tokens) on a text file."""
    cost = bench.run(
        "compress",
        "compress",
        *("-m", bench.model, "--calibration", str(bench.calibration), *_CALIBRATION),
    )
    figures = [_Figure("wall, s", cost.seconds, 180), *_cost_figures(bench, "compress", cost)]
    return _Row(figures, cost, {"calibration": bench.calibration.name})


def _export(bench: _Bench, stage: str, profile: str, dtype: str) -> _Row:
    """`skipcat export` of the compressed checkpoint."""
    checkpoint = bench.need("compress")
    cost = bench.run(stage, "export", str(checkpoint), "--profile", profile, "--dtype", dtype)
    record = json.loads((bench.path(stage) / "export.json").read_text(encoding="utf-8"))
    weights = record["weight_bytes"]
    float32_weights = weights * _ITEM_BYTES["float32"] // _ITEM_BYTES[dtype]
    disk = folder_bytes(bench.path(stage))
    figures = [
        _Figure("wall, s", cost.seconds, 90),
        _Figure("peak / float32 weights", cost.peak_bytes / float32_weights, 3),
        _Figure("disk / weights", disk / weights, 1.05),
        *_cost_figures(bench, stage, cost),
    ]
    return _Row(figures, cost, {"weight_bytes": weights, "nodes": sum(record["nodes"].values())})


def _engine(bench: _Bench, stage: str, target: str) -> _Row:
    """`skipcat engine` of the float16 export."""
    folder = bench.need("export-float16")
    cost = bench.run(stage, "engine", str(folder), "--target", target)
    manifest = json.loads((bench.path(stage) / "manifest.json").read_text(encoding="utf-8"))
    weights = json.loads((folder / "export.json").read_text(encoding="utf-8"))["weight_bytes"]
    figures = [
        _Figure("wall, s", cost.seconds),
        _Figure("plan / weights", manifest["plan"]["bytes"] / weights),
        *_cost_figures(bench, stage, cost),
    ]
    profiles = [profile["name"] for profile in manifest["profiles"]]
    return _Row(figures, cost, {"profiles": profiles, "build": manifest["build"]})


def _build(bench: _Bench) -> _Row:
    """`skipcat build` with its default settings: what `make engine` runs after set-up."""
    cost = bench.run("build", "build", "-m", bench.model)
    record = json.loads((bench.path("build") / "build.json").read_text(encoding="utf-8"))
    figures = [
        _Figure("wall, s", cost.seconds, 12 * 60),
        _Figure("peak, GB", cost.peak_bytes / _GIGABYTE, 6),
        _Figure("cpu, s", cost.cpu_seconds),
        _Figure("disk, MB", folder_bytes(bench.path("build")) / _MEGABYTE),
    ]
    return _Row(figures, cost, {"stages": record["stages"]})


def _depth(bench: _Bench, stage: str, calibration: str) -> _Row:
    """`skipcat compress` of random Llamas: what memory grows with, beyond the weights."""
    points = []
    for layers in _DEPTHS:
        folder = bench.work / f"llama-{layers}"
        weights = _random_llama(bench, folder, layers)
        cost = bench.run(stage, "compress", "-m", str(folder), "--calibration", calibration,
                         *_CALIBRATION)  # fmt: skip
        points.append({"layers": layers, "weight_bytes": weights, **asdict(cost)})
    beyond = [point["peak_bytes"] - point["weight_bytes"] for point in points]
    figures = [
        _Figure(f"peak - weights, MB, {layers} layers", extra / _MEGABYTE)
        for layers, extra in zip(_DEPTHS, beyond, strict=True)
    ]
    target = _LAYER_ACTIVATION_BYTES / _MEGABYTE
    figures.append(_Figure("its growth, MB", (beyond[-1] - beyond[0]) / _MEGABYTE, target))
    return _Row(figures, cost, {"points": points, "calibration": Path(calibration).name})


def _wide(bench: _Bench) -> _Row:
    """`skipcat compress` of a few layers of a 7B shape: memory and time of each further layer."""
    points = []
    for layers in _WIDE_DEPTHS:
        folder = bench.work / f"wide-{layers}"
        weights = _random_llama(bench, folder, layers, *_WIDE)
        cost = bench.run("wide", "compress", "-m", str(folder), "--calibration",
                         str(bench.calibration), *_WIDE_CALIBRATION,
                         "--method", _WIDE_METHOD)  # fmt: skip
        points.append({"layers": layers, "weight_bytes": weights, **asdict(cost)})
        shutil.rmtree(folder)
    first, last = points[0], points[-1]
    further = last["layers"] - first["layers"]
    growth = (last["unmapped_peak_bytes"] - first["unmapped_peak_bytes"]) / further
    figures = [
        _Figure("peak without mapped files, GB", last["unmapped_peak_bytes"] / _GIGABYTE, 24),
        _Figure("its growth per layer, GB", growth / _GIGABYTE),
        *(
            _Figure(f"cpu per layer, s, {p['layers']} layers", p["cpu_seconds"] / p["layers"])
            for p in points
        ),
    ]
    return _Row(figures, cost, {"points": points, "method": _WIDE_METHOD})


def _streamed(bench: _Bench) -> _Row:
    """`skipcat compress` of deeper and deeper models that stay in their files."""
    points = []
    for layers in _STREAMED_DEPTHS:
        folder = bench.work / f"streamed-{layers}"
        weights = _random_llama(bench, folder, layers, *_STREAMED)
        cost = bench.run("streamed", "compress", "-m", str(folder), "--calibration",
                         str(bench.calibration), *_WIDE_CALIBRATION)  # fmt: skip
        points.append({"layers": layers, "weight_bytes": weights, **asdict(cost)})
        shutil.rmtree(folder)
    first, last = points[0], points[-1]
    growth = (last["unmapped_peak_bytes"] - first["unmapped_peak_bytes"]) / _MEGABYTE
    layer_bytes = (last["weight_bytes"] - first["weight_bytes"]) / (
        last["layers"] - first["layers"]
    )
    figures = [
        *(
            _Figure(
                f"peak without mapped files, MB, {p['layers']} layers",
                p["unmapped_peak_bytes"] / _MEGABYTE,
            )
            for p in points
        ),
        _Figure("its growth, MB; at most one layer", growth, layer_bytes / _MEGABYTE),
        *(
            _Figure(f"cpu per layer, s, {p['layers']} layers", p["cpu_seconds"] / p["layers"])
            for p in points
        ),
    ]
    return _Row(figures, cost, {"points": points})


def _random_llama(bench: _Bench, folder: Path, layers: int, *shape: str) -> int:
    """Write a random model of so many layers, in a process of its own; bytes of its weights."""
    log = bench.work / f"{folder.name}.log"
    program = [sys.executable, "-m", "benchmarks.stages.random_llama"]
    command = [*program, str(folder), "--layers", str(layers), *shape]
    run_measured(command, log, bench.environment())
    return int(log.read_text(encoding="utf-8").split()[-1])


def _cost_figures(bench: _Bench, stage: str, cost: Cost) -> list[_Figure]:
    """What every row has."""
    return [
        _Figure("cpu, s", cost.cpu_seconds),
        _Figure("peak, GB", cost.peak_bytes / _GIGABYTE),
        _Figure("disk, MB", folder_bytes(bench.path(stage)) / _MEGABYTE),
    ]


_STAGES: dict[str, Callable[[_Bench], _Row]] = {
    "compress": _compress,
    "export-float32": lambda bench: _export(bench, "export-float32", "opset24", "float32"),
    "export-float16": lambda bench: _export(bench, "export-float16", "opset24", "float16"),
    "export-compat": lambda bench: _export(bench, "export-compat", "compat", "float32"),
    "engine-sm86": lambda bench: _engine(bench, "engine-sm86", "sm86"),
    "engine-sm89": lambda bench: _engine(bench, "engine-sm89", "sm89"),
    "depth": lambda bench: _depth(bench, "depth", str(bench.calibration)),
    "depth-self": lambda bench: _depth(bench, "depth-self", "self"),
    "wide": _wide,
    "streamed": _streamed,
    "build": _build,
}


@click.command()
@click.option("--only", help=f"Rows to measure, with commas: {', '.join(_STAGES)}.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Calibration text; by default random words, since only their number decides the cost.",
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the artefacts; kept.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    only: str | None, model: str, calibration: Path | None, work: Path | None, result: Path
) -> None:
    """Measure the stages and hold them to their targets."""
    names = only.split(",") if only else list(_STAGES)
    unknown = sorted(set(names) - set(_STAGES))
    if unknown:
        raise click.UsageError(f"no such row: {', '.join(unknown)}; rows: {', '.join(_STAGES)}")
    with tempfile.TemporaryDirectory(prefix="skipcat-stages-") as temporary:
        folder = (work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bench = _Bench(folder, model, calibration or _write_random_words(folder / "words.txt"))
        record = _read_record(result, model)
        for name in names:
            note(f"{name} ...")
            row = _STAGES[name](bench)
            record["rows"][name] = _row_json(row)
            result.parent.mkdir(parents=True, exist_ok=True)
            write_json(result, record)
            note(f"{name}: {row.cost.seconds:.0f} s")
    _show(record, names)


def _write_random_words(path: Path) -> Path:
    """A text of random words: more than 64 x 512 tokens of any tokenizer."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ("".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(_WORDS))
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def _read_record(result: Path, model: str) -> dict[str, Any]:
    """The rows measured earlier for the same model, else none."""
    if result.is_file():
        earlier: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if earlier.get("schema") == _SCHEMA and earlier["model"] == model:
            return earlier | {"machine": describe_machine()}
    return {"schema": _SCHEMA, "model": model, "machine": describe_machine(), "rows": {}}


def _row_json(row: _Row) -> dict[str, Any]:
    """A row as JSON, with the commit it was measured at."""
    figures = [asdict(figure) | {"verdict": figure.verdict} for figure in row.figures]
    return {
        "figures": figures,
        "cost": asdict(row.cost),
        "details": row.details,
        "provenance": provenance(),
    }


def _show(record: dict[str, Any], names: list[str]) -> None:
    """The rows just measured, on stdout."""
    machine = record["machine"]
    view = Table(title=f"{record['model']} on {machine['cores']} cores, {machine['cpu']}")
    for heading in ("row", "what", "figure", "target", "verdict", "load"):
        view.add_column(heading, justify="right" if heading in ("figure", "target") else "left")
    for name in names:
        row = record["rows"][name]
        load = " to ".join(f"{value:.1f}" for value in row["cost"]["load_average"])
        for place, figure in enumerate(row["figures"]):
            target = "-" if figure["target"] is None else f"≤ {figure['target']:.4g}"
            first = (name, load) if place == 0 else ("", "")
            view.add_row(
                first[0],
                figure["what"],
                f"{figure['value']:.4g}",
                target,
                figure["verdict"],
                first[1],
            )
    result_console().print(view)


if __name__ == "__main__":
    sys.exit(run(command))
