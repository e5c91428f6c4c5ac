"""A chain of stages is taken up where an earlier run left it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.child_process import Beside
from pipeline.errors import InputError
from pipeline.folder_lock import LOCK_FILE
from pipeline.stages import BUILD_RECORD, Stages, holds_something

DEAD = 2**30  # more than any process has


@dataclass(frozen=True)
class Request:
    model: str = "tiny"


def test_a_run_killed_while_it_wrote_its_first_record_left_nothing(tmp_path: Path) -> None:
    for name in (LOCK_FILE, f".{BUILD_RECORD}.{DEAD}"):
        (tmp_path / name).write_text("{")
    assert not holds_something(tmp_path)
    Stages.take_up(tmp_path, Request(), {})
    assert {path.name for path in tmp_path.iterdir()} == {LOCK_FILE, BUILD_RECORD}
    assert json.loads((tmp_path / BUILD_RECORD).read_text())["request"] == {"model": "tiny"}


@pytest.mark.parametrize("name", [f".{BUILD_RECORD}.mine", ".notes.json.12", "build.json.12"])
def test_a_folder_with_a_file_of_the_users_is_not_taken_up(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="not written by skipcat"):
        Stages.take_up(tmp_path, Request(), {})
    assert (tmp_path / name).read_text() == "mine"


def test_a_stage_that_failed_beside_is_done_here_and_one_that_is_there_is_not_begun(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stages = Stages.take_up(tmp_path, Request(), {})
    with Beside() as beside:
        stages.begin("a stage", "made", beside, "no-such-command")
        stages.run("a stage", "made", lambda path: path.mkdir())
        stages.begin("a stage", "made", beside, "no-such-command")
    stages.run("a stage", "made", lambda path: pytest.fail("done twice"))
    said = capfd.readouterr().err
    assert said.count("a stage, in a process beside this one") == 1
    assert said.count("failed in a process of its own (status 2)") == 1
    assert json.loads((tmp_path / BUILD_RECORD).read_text())["stages"].keys() == {"a stage"}
