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

SCHEMA = 1
RESULT = RESULTS / "stages.json"
CALIBRATION = ("--effort", "fast")
WORDS = 80_000
ITEM_BYTES = {"float32": 4, "float16": 2}
DEPTHS = (4, 8, 16)
WIDE_DEPTHS = (1, 2)
# Llama-2-7B but for its depth, and no more text than its widest input needs.
WIDE = ("--hidden", "4096", "--intermediate", "11008", "--head-width", "128", "--vocab", "32000",
        "--dtype", "bfloat16")  # fmt: skip
# Streamed, as a whole Llama-2-7B would be here: few layers of it would fit memory.
WIDE_CALIBRATION = ("--effort", "fast", "--windows", "24", "--dtype", "bfloat16",
                    "--stream-weights")  # fmt: skip
WIDE_METHOD = "skipcat"
# Eight times narrower, so that many layers take minutes.
STREAMED_DEPTHS = (4, 8, 16)
STREAMED = ("--hidden", "512", "--intermediate", "1376", "--dtype", "bfloat16")
# One layer's activations of all calibration tokens, in float32, at the width of random_llama.py:
# less than this is no leak of one layer's worth.
LAYER_ACTIVATION_BYTES = 64 * 512 * 256 * 4
GIGABYTE = 1e9
MEGABYTE = 1e6


@dataclass(frozen=True)
class Figure:
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
class Bench:
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
            STAGES[stage](self)
        return self.path(stage)


@dataclass(frozen=True)
class Row:
    """What measuring a stage gave."""

    figures: list[Figure]
    cost: Cost
    details: dict[str, Any] = field(default_factory=dict)


def compress(bench: Bench) -> Row:
    """`skipcat compress`, `--effort fast` (64 x 512 tokens) on a text file."""
    cost = bench.run(
        "compress",
        "compress",
        *("-m", bench.model, "--calibration", str(bench.calibration), *CALIBRATION),
    )
    figures = [Figure("wall, s", cost.seconds, 180), *cost_figures(bench, "compress", cost)]
    return Row(figures, cost, {"calibration": bench.calibration.name})


def export(bench: Bench, stage: str, profile: str, dtype: str) -> Row:
    """`skipcat export` of the compressed checkpoint."""
    checkpoint = bench.need("compress")
    cost = bench.run(stage, "export", str(checkpoint), "--profile", profile, "--dtype", dtype)
    record = json.loads((bench.path(stage) / "export.json").read_text(encoding="utf-8"))
    weights = record["weight_bytes"]
    float32_weights = weights * ITEM_BYTES["float32"] // ITEM_BYTES[dtype]
    disk = folder_bytes(bench.path(stage))
    figures = [
        Figure("wall, s", cost.seconds, 90),
        Figure("peak / float32 weights", cost.peak_bytes / float32_weights, 3),
        Figure("disk / weights", disk / weights, 1.05),
        *cost_figures(bench, stage, cost),
    ]
    return Row(figures, cost, {"weight_bytes": weights, "nodes": sum(record["nodes"].values())})


def engine(bench: Bench, stage: str, target: str) -> Row:
    """`skipcat engine` of the float16 export."""
    folder = bench.need("export-float16")
    cost = bench.run(stage, "engine", str(folder), "--target", target)
    manifest = json.loads((bench.path(stage) / "manifest.json").read_text(encoding="utf-8"))
    weights = json.loads((folder / "export.json").read_text(encoding="utf-8"))["weight_bytes"]
    figures = [
        Figure("wall, s", cost.seconds),
        Figure("plan / weights", manifest["plan"]["bytes"] / weights),
        *cost_figures(bench, stage, cost),
    ]
    profiles = [profile["name"] for profile in manifest["profiles"]]
    return Row(figures, cost, {"profiles": profiles, "build": manifest["build"]})


def build(bench: Bench) -> Row:
    """`skipcat build` with its default settings: what `make engine` runs after set-up."""
    cost = bench.run("build", "build", "-m", bench.model)
    record = json.loads((bench.path("build") / "build.json").read_text(encoding="utf-8"))
    figures = [
        Figure("wall, s", cost.seconds, 12 * 60),
        Figure("peak, GB", cost.peak_bytes / GIGABYTE, 6),
        Figure("cpu, s", cost.cpu_seconds),
        Figure("disk, MB", folder_bytes(bench.path("build")) / MEGABYTE),
    ]
    return Row(figures, cost, {"stages": record["stages"]})


def depth(bench: Bench, stage: str, calibration: str) -> Row:
    """`skipcat compress` of random Llamas: what memory grows with, beyond the weights."""
    points = []
    for layers in DEPTHS:
        folder = bench.work / f"llama-{layers}"
        weights = random_llama(bench, folder, layers)
        cost = bench.run(stage, "compress", "-m", str(folder), "--calibration", calibration,
                         *CALIBRATION)  # fmt: skip
        points.append({"layers": layers, "weight_bytes": weights, **asdict(cost)})
    beyond = [point["peak_bytes"] - point["weight_bytes"] for point in points]
    figures = [
        Figure(f"peak - weights, MB, {layers} layers", extra / MEGABYTE)
        for layers, extra in zip(DEPTHS, beyond, strict=True)
    ]
    target = LAYER_ACTIVATION_BYTES / MEGABYTE
    figures.append(Figure("its growth, MB", (beyond[-1] - beyond[0]) / MEGABYTE, target))
    return Row(figures, cost, {"points": points, "calibration": Path(calibration).name})


def wide(bench: Bench) -> Row:
    """`skipcat compress` of a few layers of a 7B shape: memory and time of each further layer."""
    points = []
    for layers in WIDE_DEPTHS:
        folder = bench.work / f"wide-{layers}"
        weights = random_llama(bench, folder, layers, *WIDE)
        cost = bench.run("wide", "compress", "-m", str(folder), "--calibration",
                         str(bench.calibration), *WIDE_CALIBRATION,
                         "--method", WIDE_METHOD)  # fmt: skip
        points.append({"layers": layers, "weight_bytes": weights, **asdict(cost)})
        shutil.rmtree(folder)
    first, last = points[0], points[-1]
    further = last["layers"] - first["layers"]
    growth = (last["unmapped_peak_bytes"] - first["unmapped_peak_bytes"]) / further
    figures = [
        Figure("peak without mapped files, GB", last["unmapped_peak_bytes"] / GIGABYTE, 24),
        Figure("its growth per layer, GB", growth / GIGABYTE),
        *(
            Figure(f"cpu per layer, s, {p['layers']} layers", p["cpu_seconds"] / p["layers"])
            for p in points
        ),
    ]
    return Row(figures, cost, {"points": points, "method": WIDE_METHOD})


def streamed(bench: Bench) -> Row:
    """`skipcat compress` of deeper and deeper models that stay in their files."""
    points = []
    for layers in STREAMED_DEPTHS:
        folder = bench.work / f"streamed-{layers}"
        weights = random_llama(bench, folder, layers, *STREAMED)
        cost = bench.run("streamed", "compress", "-m", str(folder), "--calibration",
                         str(bench.calibration), *WIDE_CALIBRATION)  # fmt: skip
        points.append({"layers": layers, "weight_bytes": weights, **asdict(cost)})
        shutil.rmtree(folder)
    first, last = points[0], points[-1]
    growth = (last["unmapped_peak_bytes"] - first["unmapped_peak_bytes"]) / MEGABYTE
    layer_bytes = (last["weight_bytes"] - first["weight_bytes"]) / (
        last["layers"] - first["layers"]
    )
    figures = [
        *(
            Figure(
                f"peak without mapped files, MB, {p['layers']} layers",
                p["unmapped_peak_bytes"] / MEGABYTE,
            )
            for p in points
        ),
        Figure("its growth, MB; at most one layer", growth, layer_bytes / MEGABYTE),
        *(
            Figure(f"cpu per layer, s, {p['layers']} layers", p["cpu_seconds"] / p["layers"])
            for p in points
        ),
    ]
    return Row(figures, cost, {"points": points})


def random_llama(bench: Bench, folder: Path, layers: int, *shape: str) -> int:
    """Write a random model of so many layers, in a process of its own; bytes of its weights."""
    log = bench.work / f"{folder.name}.log"
    program = [sys.executable, "-m", "benchmarks.stages.random_llama"]
    command = [*program, str(folder), "--layers", str(layers), *shape]
    run_measured(command, log, bench.environment())
    return int(log.read_text(encoding="utf-8").split()[-1])


def cost_figures(bench: Bench, stage: str, cost: Cost) -> list[Figure]:
    """What every row has."""
    return [
        Figure("cpu, s", cost.cpu_seconds),
        Figure("peak, GB", cost.peak_bytes / GIGABYTE),
        Figure("disk, MB", folder_bytes(bench.path(stage)) / MEGABYTE),
    ]


STAGES: dict[str, Callable[[Bench], Row]] = {
    "compress": compress,
    "export-float32": lambda bench: export(bench, "export-float32", "opset24", "float32"),
    "export-float16": lambda bench: export(bench, "export-float16", "opset24", "float16"),
    "export-compat": lambda bench: export(bench, "export-compat", "compat", "float32"),
    "engine-sm86": lambda bench: engine(bench, "engine-sm86", "sm86"),
    "engine-sm89": lambda bench: engine(bench, "engine-sm89", "sm89"),
    "depth": lambda bench: depth(bench, "depth", str(bench.calibration)),
    "depth-self": lambda bench: depth(bench, "depth-self", "self"),
    "wide": wide,
    "streamed": streamed,
    "build": build,
}


@click.command()
@click.option("--only", help=f"Rows to measure, with commas: {', '.join(STAGES)}.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Calibration text; by default random words, since only their number decides the cost.",
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the artefacts; kept.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULT)
def command(
    only: str | None, model: str, calibration: Path | None, work: Path | None, result: Path
) -> None:
    """Measure the stages and hold them to their targets."""
    names = only.split(",") if only else list(STAGES)
    unknown = sorted(set(names) - set(STAGES))
    if unknown:
        raise click.UsageError(f"no such row: {', '.join(unknown)}; rows: {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory(prefix="skipcat-stages-") as temporary:
        folder = (work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, model, calibration or write_random_words(folder / "words.txt"))
        record = read_record(result, model)
        for name in names:
            note(f"{name} ...")
            row = STAGES[name](bench)
            record["rows"][name] = row_json(row)
            result.parent.mkdir(parents=True, exist_ok=True)
            write_json(result, record)
            note(f"{name}: {row.cost.seconds:.0f} s")
    show(record, names)


def write_random_words(path: Path) -> Path:
    """A text of random words: more than 64 x 512 tokens of any tokenizer."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ("".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(WORDS))
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def read_record(result: Path, model: str) -> dict[str, Any]:
    """The rows measured earlier for the same model, else none."""
    if result.is_file():
        earlier: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if earlier.get("schema") == SCHEMA and earlier["model"] == model:
            return earlier | {"machine": describe_machine()}
    return {"schema": SCHEMA, "model": model, "machine": describe_machine(), "rows": {}}


def row_json(row: Row) -> dict[str, Any]:
    """A row as JSON, with the commit it was measured at."""
    figures = [asdict(figure) | {"verdict": figure.verdict} for figure in row.figures]
    return {
        "figures": figures,
        "cost": asdict(row.cost),
        "details": row.details,
        "provenance": provenance(),
    }


def show(record: dict[str, Any], names: list[str]) -> None:
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
