"""A search and its splits are of one budget, and measured once each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.quality import cache_budget
from tests.support.families import save_family

CONTEXT, MEMORY = 64, 70_000


def test_the_search_and_a_split_take_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_budget, "_WINDOW_LENGTH", 64)
    monkeypatch.setattr(cache_budget, "_SHARES", (0.1,))
    save_family(tmp_path / "model", "qwen3")
    (tmp_path / "read").write_text("A budget is divided among weights and cache. " * 60)
    (tmp_path / "test").write_text("What a token takes is in the cache for good. " * 20)
    arguments = ["--calibration", str(tmp_path / "read"), "--test", str(tmp_path / "test")]
    arguments += ["--model", str(tmp_path / "model"), "--windows", "2", "--memory", str(MEMORY)]
    arguments += ["--context", str(CONTEXT), "--json", str(tmp_path / "found.json")]
    arguments += ["--calibration-windows", "16", "--calibration-length", "64"]
    done = CliRunner().invoke(cache_budget.command, arguments)
    assert done.exit_code == 0, done.exception
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["one budget", "10% for the cache"]
    for row in rows:
        taken = row["memory_bytes"]
        if row["name"] != "one budget":
            taken += CONTEXT * row["cache_bytes_a_token"]
        assert taken <= MEMORY
        assert row["kl"] > 0
