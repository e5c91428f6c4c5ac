"""Exported folders for the tests of the engine stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tiny_graph import write_export


@pytest.fixture(scope="session")
def export_writer() -> Callable[..., Path]:
    """`write_export`, for tests that need a folder of their own."""
    return write_export


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An opset24 float16 folder that no test changes."""
    return write_export(tmp_path_factory.mktemp("exports") / "tiny")
