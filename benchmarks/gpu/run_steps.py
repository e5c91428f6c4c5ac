"""The steps of the GPU command within its minutes: children, what they say, and the file of it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from benchmarks import RESULTS
from benchmarks.gpu.steps import STEPS, Step
from pipeline.artefact import write_json
from pipeline.child_process import ChildEndedError, JsonChild
from pipeline.errors import UsageError
from pipeline.gpu import find_gpu
from pipeline.json_file import read_json_object
from pipeline.provenance import provenance

_ROOT = Path(__file__).resolve().parents[2]
_RESULT = RESULTS / "gpu.json"
_PREPARED = _ROOT / "build" / "gpu"
_RIVAL = "gemlite==0.6.0.post2"
_DRY = "CPU, emulated: times mean nothing"
_DRY_PATIENCE = 10.0  # an emulated kernel takes thousands of times what it would
# Kept back of the minutes: for the child to be ended and the table to be printed.
_KEPT_BACK_S = 5.0
_CARD = "card"  # the step that says what later ones are held against: of the same run, always


@dataclass
class _Run:
    """One run over the steps.

    Attributes:
        path: of the file of results.
        card: whose part of it is written.
        device: `cuda` or `cpu`.
        ends: when the time is over, on the monotonic clock.
        patience: times a step's seconds, that it may take.
        seed: of all data.
        child: in which steps run.
    """

    path: Path
    card: str
    device: str
    ends: float
    patience: float = 1.0
    seed: int = field(default_factory=lambda: secrets.randbelow(1 << 31))
    child: JsonChild | None = None

    def __post_init__(self) -> None:
        self.provenance = provenance()
        self.record = read_json_object(self.path) if self.path.is_file() else {"cards": {}}
        self.steps: dict[str, Any] = self.record["cards"].setdefault(self.card, {})

    def go_through(self, chosen: tuple[Step, ...]) -> None:
        """Every step that is not done, while there is time."""
        for step in chosen:
            told = {} if step.name == _CARD else self.steps.get(step.name, {})
            if told.get("status") == "done":
                continue
            left = self.ends - time.monotonic() - _KEPT_BACK_S
            if left < step.least_s:
                self._note(step, told.get("rows", {}), "not begun", f"{max(0, left):.0f} s left")
                continue
            self._run_step(step, min(self.patience * step.most_s, left), told.get("rows", {}))
        if self.child:
            self.child.close(at_once=True)

    def _run_step(self, step: Step, seconds: float, rows: dict[str, Any]) -> None:
        """One step in the child, every row written as it comes."""
        started = time.monotonic()
        if self.child is None:
            command = (sys.executable, "-m", "benchmarks.gpu.worker")
            self.child = JsonChild(command, own_session=True)
        child = self.child
        over = threading.Timer(seconds, _end, (child,))
        over.start()
        status, why = "stopped", f"its {seconds:.0f} s were over"
        try:
            answer = child.ask(**self._request(step, seconds, rows))
            while "row" in answer:
                rows[answer["row"]] = answer["holds"]
                _show(step.name, answer["row"], answer["holds"])
                self._note(step, rows, "running")
                answer = child.hear()
            status, why = ("done", "") if "end" in answer else ("failed", answer["failed"])
        except ChildEndedError as error:
            if time.monotonic() - started < seconds:
                status, why = "failed", f"its process ended: {error}"
        finally:
            over.cancel()
        if status != "done":
            child.close(at_once=True)
            _end(child)
            self.child = None
            click.echo(f"{step.name}: {status}: {why}")
        self._note(step, rows, status, why, time.monotonic() - started)

    def _request(self, step: Step, seconds: float, rows: dict[str, Any]) -> dict[str, Any]:
        """What the child is told; the bandwidth is that of the same run."""
        request = {"rows": step.rows, "device": self.device, "seed": self.seed}
        request |= {"done": list(rows), "seconds": seconds}
        known = self.steps.get(_CARD, {}).get("rows", {}).get("memory", {})
        return request | ({"bytes_per_s": known["bytes_per_s"]} if known else {})

    def _note(
        self, step: Step, rows: dict[str, Any], status: str, why: str = "", seconds: float = 0.0
    ) -> None:
        """Write what is known of a step."""
        told = {"status": status, "why": why, "seconds": round(seconds, 1), "seed": self.seed}
        self.steps[step.name] = told | {"provenance": self.provenance, "rows": rows}
        write_json(self.path, self.record)


def _end(child: JsonChild) -> None:
    """Kill a child with all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _show(step: str, name: str, row: dict[str, Any]) -> None:
    """A row: what it says, and the verdicts that say something."""
    click.echo(f"{step}: {name}: {row.get('says', '')}")
    for item in row.get("verdicts", []):
        number = f" {item['observed']:.3g}" if "observed" in item else ""
        asked = next((f", {end} {item[end]:g}" for end in ("least", "most") if end in item), "")
        if item["verdict"] != "not judged":
            why = item.get("why", "")
            click.echo(f"  {item['verdict']:<7} {item['claim']}{number}{asked} {why}")


def _card_name() -> str:
    """The name of this machine's GPU, asked for without PyTorch, which takes seconds to start.

    Raises:
        UsageError: there is none.
    """
    gpu = find_gpu()
    if gpu is None:
        raise UsageError("There is no NVIDIA GPU here.", change="pass --dry")
    return gpu.name


def _prepare(capability: int) -> None:
    """Compile the kernel libraries and the plugin's harness, and fetch the rival, into build/."""
    from pipeline.kernels.build import BLOCK_SKIP, LATENT_ATTENTION, build_library

    os.environ["SKIPCAT_CACHE"] = str(_PREPARED / "cache")
    for kernels in (BLOCK_SKIP, LATENT_ATTENTION):
        click.echo(f"kernels: {build_library(capability, kernels)}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    plugin = [sys.executable, str(_ROOT / "tools" / "build_plugin.py")]
    for what, command in (
        ("rival", [*pip, "--target", str(_PREPARED / "site"), _RIVAL]),
        ("plugin and harness", plugin),
    ):
        status = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        click.echo(f"{what}: {'there' if status == 0 else f'not there, exit status {status}'}")


def _use_what_is_prepared() -> None:
    """Let children find the library and the rival that were carried along."""
    if _PREPARED.is_dir():
        os.environ.setdefault("SKIPCAT_CACHE", str(_PREPARED / "cache"))
        paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(_PREPARED / "site")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def _summarise(steps: dict[str, Any]) -> None:
    """How each step ended, and how many of its claims hold."""
    for name, told in steps.items():
        counts: dict[str, int] = {}
        for row in told["rows"].values():
            for item in row.get("verdicts", []):
                counts[item["verdict"]] = counts.get(item["verdict"], 0) + 1
        shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        why = told["why"].splitlines()[-1] if told["why"] else ""
        click.echo(f"{name:<22} {told['status']:<9} {told['seconds']:6.1f} s  {shown} {why}")


@click.command()
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.2),
    default=8.0,
    show_default=True,
    help="For all of it, the start of Python included.",
)
@click.option("--dry", is_flag=True, help="On the CPU: tiny layers, kernels emulated.")
@click.option("--prepare", is_flag=True, help="Compile what --minutes would, and do no more.")
@click.option("--capability", default=90, show_default=True, help="Of the GPU to prepare for.")
@click.option("--only", help="Names of steps, separated by commas; by default all.")
@click.option("--json", "result", type=click.Path(path_type=Path), help=f"By default {_RESULT}.")
def command(
    minutes: float, dry: bool, prepare: bool, capability: int, only: str | None, result: Path | None
) -> None:
    """Go through every step, write the JSON after each row, and print what holds."""
    started = time.monotonic()
    if prepare:
        _prepare(capability)
        return
    if dry and result is None:
        result = _PREPARED.with_name("gpu-dry.json")
        result.parent.mkdir(exist_ok=True)
        result.unlink(missing_ok=True)
    names = [step.name for step in STEPS]
    wanted = names if only is None else only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        raise click.UsageError(f"no such step: {', '.join(unknown)}; there are {', '.join(names)}")
    _use_what_is_prepared()
    card = _DRY if dry else _card_name()
    device, patience = ("cpu", _DRY_PATIENCE) if dry else ("cuda", 1.0)
    ends = started + 60 * minutes
    going = _Run(result or _RESULT, card, device, ends, patience)
    going.go_through(tuple(step for step in STEPS if step.name in wanted))
    _summarise(going.steps)
    click.echo(f"{card}: {time.monotonic() - started:.0f} s; {going.path}")
