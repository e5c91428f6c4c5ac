"""A build that is killed goes on to the same bytes; one whose disk is full ends with status 4."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.artefact import sha256_of_file
from pipeline.child_process import environment
from pipeline.cli.main import main
from tests.support.tiny_build import build_arguments

# So many in `make test-slow`; what was seen once is 200 and 50.
KILLS, FULL_DISKS = (int(os.environ.get(name, "12")) for name in ("KILLS", "FULL_DISKS"))
# What says when and how fast it was made.
TIMED = {"build.json", "recipe.json", "report.json", "export.json", "ledger.json", "ledger.html"}


def run_until(folder: Path, place: int, action: str, arguments: list[str]) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command to which something happens at its n-th change."""
    program = [sys.executable, "-m", "tests.support.at_a_write", str(folder), str(place), action]
    answer = subprocess.run(
        [*program, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    return answer.returncode, answer.stdout, answer.stderr


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file by its name, of those that say when they were made only that they are."""
    return {
        str(path.relative_to(folder)): "" if path.name in TIMED else sha256_of_file(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_arguments(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(
    arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], int]:
    """What a build writes, and in how many changes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    status, told, error = run_until(folder, 0, "count", [*arguments, "-o", str(folder)])
    assert status == 0, error
    return contents(folder), int(told.splitlines()[-1])


def require_same_after_kill(
    seed: int, arguments: list[str], undisturbed: tuple[dict[str, str], int], output: Path
) -> None:
    expected, changes = undisturbed
    place = random.Random(seed).randint(1, changes)
    command = [*arguments, "-o", str(output)]
    status, _, error = run_until(output, place, "kill", command)
    assert status == -signal.SIGKILL, error
    assert main([*command, "--resume"]) == 0
    assert contents(output) == expected, f"killed at change {place} of {changes}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_builds_are_resumed_to_the_same_bytes(
    seed: int, arguments: list[str], undisturbed: tuple[dict[str, str], int], tmp_path: Path
) -> None:
    require_same_after_kill(seed, arguments, undisturbed, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("may not mount")
    yield disk
    # Lazily: this process has files of it mapped.
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def require_told(
    seed: int, action: str, folder: Path, arguments: list[str], changes: int, latest: float
) -> None:
    """Let the disk fill up somewhere in a build, and free it: 4, no traceback, and it goes on."""
    place = random.Random(seed).randint(1, int(changes * latest))
    command = [*arguments, "-o", str(folder / "out")]
    status, _, error = run_until(folder, place, action, command)
    assert "Traceback" not in error
    assert status == 4 or (status == 0 and latest == 1), error
    assert str(folder) in error or status == 0
    (folder / "..filler").unlink(missing_ok=True)
    if (folder / "out").exists():
        command.append("--resume")
    assert main(command) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FULL_DISKS))
def test_disks_that_fill_up_are_told_with_4(
    seed: int, arguments: list[str], undisturbed: tuple[dict[str, str], int], small_disk: Path
) -> None:
    action = "fill" if seed % 2 else "limit"
    require_told(seed, action, small_disk, arguments, undisturbed[1], 1.0)
