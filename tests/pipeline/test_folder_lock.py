"""One process at a time in a folder; a lock of a dead process is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.artefact import staged_folder
from pipeline.child_process import environment
from pipeline.errors import UsageError
from pipeline.folder_lock import LOCK_FILE, FolderLock

HOLD = """
import sys
from pathlib import Path
from pipeline.artefact import staged_folder
with staged_folder(Path(sys.argv[1]), keep=True) as folder:
    (folder / "half.txt").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(output: Path) -> subprocess.Popen[str]:
    """A process that works on an output until its input ends."""
    command = [sys.executable, "-c", HOLD, str(output)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty folder"])
def test_a_second_run_ends_at_once_with_the_pid_of_the_first_and_harms_nothing(
    is_there: bool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    if is_there:
        output.mkdir()
    child = hold(output)
    several: tuple[dict[str, Any], ...] = ({}, {"resume": True, "keep": True}, {"overwrite": True})
    for options in several:
        with (
            pytest.raises(UsageError, match=f"process {child.pid}"),
            staged_folder(output, **options),
        ):
            pytest.fail("both work on it")
    child.communicate("")
    assert child.returncode == 0
    assert [path.name for path in output.iterdir()] == ["half.txt"]
    assert list(tmp_path.iterdir()) == [output]


def test_a_killed_run_holds_nothing_and_is_taken_up(tmp_path: Path) -> None:
    output = tmp_path / "out"
    child = hold(output)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with staged_folder(output, resume=True) as folder:
        assert (folder / "half.txt").read_text() == "half"
    assert [path.name for path in output.iterdir()] == ["half.txt"]


def test_a_lock_leaves_no_file_and_follows_its_folder(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a") as lock:
        assert (tmp_path / "a" / LOCK_FILE).read_text() == f"{os.getpid()}\n"
        (tmp_path / "a").rename(tmp_path / "b")
        lock.folder = tmp_path / "b"
    assert list((tmp_path / "b").iterdir()) == []
