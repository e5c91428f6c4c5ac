from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_server import LiveServer, live_server
from tests.support.tiny_decoder import save_tiny_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("served") / "folder")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[LiveServer]:
    with live_server(folder, slots=3, queue=64) as server:
        yield server
