"""Rows of the table of caches are measured once each, whenever it is run, on one text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.quality import cache
from tests.support.families import save_family


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, two texts, and windows that are short enough for it."""
    monkeypatch.setattr(cache, "_WINDOW_LENGTH", 64)
    monkeypatch.setattr(cache, "_CALIBRATION_LENGTH", 32)
    save_family(tmp_path / "model", "qwen3")
    (tmp_path / "read").write_text("A cache holds what was read before. " * 40)
    asked = {
        "question": "What is cached?",
        "choices": ["Nothing.", "Keys and values."],
        "answer": 1,
    }
    (tmp_path / "asked.jsonl").write_text("\n".join([json.dumps(asked)] * 20))
    return tmp_path


def measured(place: Path, only: str, calibration: str = "read") -> Result:
    arguments = ["--calibration", str(place / calibration), "--test", str(place / "asked.jsonl")]
    arguments += ["--model", str(place / "model"), "--windows", "2", "--calibration-windows", "8"]
    arguments += ["--only", only, "--json", str(place / "cache.json")]
    return CliRunner().invoke(cache.command, arguments)


def test_every_row_has_a_name_of_its_own_and_both_charts_have_rows() -> None:
    rows = cache._rows()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.rebuilds for row in rows} == {True, False}
    assert not any(row.rebuilds for row in rows if row.chosen is not None or row.static)


def test_a_second_run_goes_on_behind_the_rows_of_the_first(place: Path) -> None:
    assert measured(place, "int8").exit_code == 0
    before = json.loads((place / "cache.json").read_text())["rows"]
    assert [row["cache"] for row in before] == [
        "int8 by token",
        "int8, static scales (ONNX Runtime)",
    ]
    assert measured(place, "narrow, 8").exit_code == 0
    record = json.loads((place / "cache.json").read_text())
    assert record["rows"][:2] == before
    last = record["rows"][-1]
    assert (last["cache"], last["rebuilds"]) == ("narrow, 8", False)
    assert last["bits"] <= 8
    assert 0 <= last["kl"] < 1
    assert (place / "cache.svg").is_file()
    assert (place / "cache_at_once.svg").is_file()


def test_rows_of_another_text_are_kept_apart_and_the_test_text_is_not_calibrated_on(
    place: Path,
) -> None:
    (place / "cache.json").write_text(json.dumps({"model": "another", "rows": []}))
    assert "measured otherwise" in str(measured(place, "int8").exception)
    assert "must not be calibrated" in str(measured(place, "int8", "asked.jsonl").exception)
    assert "no such row" in str(measured(place, "int9").exception)
