"""Rows of a table are the same whoever measures them, and stand in their order."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.quality import pareto, quality
from pipeline.errors import UsageError
from pipeline.workers.workers import Workers
from tests.support.elsewhere import Elsewhere
from tests.support.families import save_family

_OF_A_RUN = ("seconds", "load_average")
ROWS = {
    quality: ["skipcat:0.8:fast", "skipcat-kl:0.8:fast", "skipcat-kl:0.7:fast"],
    pareto: ["ours:0.4", "rtn:4", "ours:0.5"],
}


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    save_family(tmp_path / "model", "llama", max_position_embeddings=2048)
    (tmp_path / "read").write_text("A table has rows, and each of them is a run. " * 900)
    (tmp_path / "test").write_text("What is measured was not read before. " * 200)
    found = ["--calibration", str(tmp_path / "read"), "--test", str(tmp_path / "test")]
    return [*found, "--model", str(tmp_path / "model"), "--test-windows", "2"]


def measured(command: Any, arguments: list[str], result: Path) -> dict[str, Any]:
    done = CliRunner().invoke(command, [*arguments, "--json", str(result)])
    assert done.exit_code == 0, done.exception
    record: dict[str, Any] = json.loads(result.read_text())
    return record


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.endswith(_OF_A_RUN)}
        for row in record["rows"]
    ]


@pytest.mark.parametrize("table", ROWS, ids=lambda table: table.__name__.rpartition(".")[2])
def test_rows_by_workers_are_those_of_one_process(
    table: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments += ["--only", ",".join(ROWS[table])]
    own = measured(table.command, arguments, tmp_path / "own.json")
    workers = Elsewhere()

    @contextlib.contextmanager
    def opened(place: str | None) -> Iterator[Workers]:
        assert place == "local:2"
        yield workers

    monkeypatch.setattr(table, "open_workers", opened)
    found = measured(table.command, [*arguments, "--workers", "local:2"], tmp_path / "there.json")
    assert rows_of(found) == rows_of(own)
    assert len(own["rows"]) == len(workers.asked) + 1 == 4
    assert (own["computed_by"], found["computed_by"]) == ({}, {"workers": 2})


def test_machines_that_see_no_common_folder_are_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(quality.command, [*arguments, "--workers", "ray://host:10001"])
    assert isinstance(done.exception, UsageError)
    assert "--work FOLDER" in done.exception.details["expected"]
