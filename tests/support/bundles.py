"""Bundles on the fake board: their own program in a process of its own, and what they hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.fake_gpu.board import Board


def program(
    board: Board, folder: Path, *arguments: object, python: str = sys.executable, version: str = ""
) -> subprocess.CompletedProcess[str]:
    """The bundle's own program, elsewhere than in this checkout.

    Args:
        board: the fake.
        folder: of the bundle.
        arguments: of the program.
        python: that runs it.
        version: of the fake TensorRT; as it is without one.
    """
    chosen = {"FAKE_TENSORRT": version} if version else {}
    return subprocess.run(
        [python, str(folder / "skipcat-device"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=board.environment() | chosen,
        cwd=folder.parent,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its place in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
