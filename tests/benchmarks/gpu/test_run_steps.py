"""A step that fails, hangs or dies costs itself alone; what was measured is in the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.gpu.run_steps import _Run, command
from benchmarks.gpu.steps import STEPS, Row, Setting, Step, outcome, verdict, within
from pipeline.gpu import find_gpu

ROOT = Path(__file__).parents[3]


def good(setting: Setting) -> Iterator[Row]:
    for name in ("one", "two"):
        if name not in setting.done:
            yield name, {"seed": setting.seed, "verdicts": [outcome("holds", True)]}


def memory(setting: Setting) -> Iterator[Row]:
    yield "memory", {"bytes_per_s": 5.0}


def told(setting: Setting) -> Iterator[Row]:
    yield "told", {"bytes_per_s": setting.bytes_per_s, "pid": os.getpid()}


def failing(setting: Setting) -> Iterator[Row]:
    yield "before", {}
    raise ValueError("out of luck")


def dying(setting: Setting) -> Iterator[Row]:
    yield "before", {}
    os.abort()


def hanging(setting: Setting) -> Iterator[Row]:
    with subprocess.Popen(["sleep", "600"]) as child:  # which must go, too
        yield "child", {"pid": child.pid}
        time.sleep(600)


def runs(pid: int) -> bool:
    """Whether a process does anything still; whoever is to reap it may take a while."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def step(function: Any, name: str = "", most_s: float = 120.0, least_s: float = 0.5) -> Step:
    where = f"tests.benchmarks.gpu.test_run_steps:{function.__name__}"
    return Step(name or function.__name__, where, most_s, least_s)


def go(path: Path, *steps: Step, seconds: float = 300.0) -> dict[str, Any]:
    """What the file says after a run over some steps."""
    _Run(path, "a card", "cpu", time.monotonic() + seconds).go_through(steps)
    written: dict[str, Any] = json.loads(path.read_text())["cards"]["a card"]
    return written


def test_what_fails_or_dies_or_hangs_costs_itself_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = go(
        tmp_path / "r.json",
        step(memory, "card"),
        step(failing),
        step(dying),
        step(hanging, most_s=8),
        step(told),
        step(good),
    )
    states = {name: held["status"] for name, held in found.items()}
    assert states == {
        "card": "done", "failing": "failed", "dying": "failed", "hanging": "stopped",
        "told": "done", "good": "done",
    }  # fmt: skip
    assert "out of luck" in found["failing"]["why"]
    assert "signal 6" in found["dying"]["why"]
    assert found["failing"]["rows"] == found["dying"]["rows"] == {"before": {}}
    assert not runs(found["hanging"]["rows"]["child"]["pid"])
    # The bandwidth of the run's first step is what later ones are held against.
    assert found["told"]["rows"]["told"]["bytes_per_s"] == 5.0
    assert "pass    holds" in capsys.readouterr().out


def test_a_second_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = go(path, step(good), step(failing))
    record = json.loads(path.read_text())
    del record["cards"]["a card"]["good"]["rows"]["two"]
    record["cards"]["a card"]["good"]["status"] = "stopped"
    path.write_text(json.dumps(record))
    second = go(path, step(good), step(failing))
    seeds = [second["good"]["rows"][name]["seed"] for name in ("one", "two")]
    assert seeds[0] == first["good"]["seed"] != seeds[1]
    assert second["good"]["status"] == "done"
    third = go(path, step(good))
    assert third["good"] == second["good"]


def test_cards_have_parts_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"cards": {"another": {"good": {"status": "done"}}}}))
    assert go(path, step(good))["good"]["rows"].keys() == {"one", "two"}
    assert json.loads(path.read_text())["cards"]["another"] == {"good": {"status": "done"}}


def test_a_step_for_which_no_time_is_left_is_not_begun(tmp_path: Path) -> None:
    found = go(tmp_path / "r.json", step(good, least_s=50), seconds=20)
    assert found["good"]["status"] == "not begun"
    assert "15 s left" in found["good"]["why"] or "14 s left" in found["good"]["why"]


def test_nan_never_passes() -> None:
    nan = float("nan")
    assert verdict("a ratio", nan, 0.5)["verdict"] == "missed"
    assert within("an error", nan, 0.5)["verdict"] == "missed"
    assert verdict("a ratio", 0.5, 0.5)["verdict"] == "pass"
    assert verdict("a ratio", 0.5, 0.5, judged=False)["verdict"] == "not judged"


def test_a_card_of_ten_minutes_has_time_for_what_matters_most() -> None:
    first = [held.name for held in STEPS[:4]]
    assert first == ["card", "errors", "decode layers", "decode 8B"]
    # A minute for the start and for the card, whose kernels were compiled before.
    assert 60 + sum(held.most_s for held in STEPS[1:7]) <= 8 * 60


def test_without_a_gpu_or_of_unknown_steps_it_says_so(tmp_path: Path) -> None:
    answer = CliRunner().invoke(command, ["--dry", "--only", "errors,nothing"])
    assert answer.exit_code == 2
    assert "no such step: nothing" in answer.output
    if find_gpu() is None:
        answer = CliRunner().invoke(command, ["--json", str(tmp_path / "r.json")])
        assert "no NVIDIA GPU" in str(answer.exception)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dry_run_goes_through_every_step_and_is_run_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "dry.json"
    program = str(ROOT / "benchmarks" / "gpu" / "all.py")
    command = [sys.executable, program, "--dry", "--minutes", "30", "--json", str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (steps,) = json.loads(path.read_text(), parse_constant=pytest.fail)["cards"].values()
    assert [name for name, held in steps.items() if held["status"] != "done"] == []
    assert [*steps] == [held.name for held in STEPS]
    verdicts = [
        (name, item["claim"], item["verdict"])
        for name, held in steps.items()
        for row in held["rows"].values()
        for item in row.get("verdicts", [])
    ]
    assert [found for found in verdicts if found[2] == "missed"] == []
    assert {name for name, _, found in verdicts if found == "pass"} >= {
        "card", "errors", "decode layers", "decode 8B", "prefill layers", "memcheck",
    }  # fmt: skip
