"""Planned against measured costs of a cache, side by side."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.quality import planned_cache
from tests.support.families import save_family


def test_every_side_of_every_budget_has_both_costs(tmp_path: Path) -> None:
    save_family(tmp_path / "model", "llama")
    (tmp_path / "read").write_text("A cache holds what was read before. " * 400)
    (tmp_path / "test").write_text("Keys and values of all tokens before. " * 400)
    arguments = ["--calibration", str(tmp_path / "read"), "--test", str(tmp_path / "test")]
    arguments += ["--model", str(tmp_path / "model"), "--json", str(tmp_path / "found.json")]
    arguments += ["--windows", "2", "--calibration-windows", "4"]
    done = CliRunner().invoke(planned_cache.command, arguments)
    assert done.exit_code == 0, done.exception
    record = json.loads((tmp_path / "found.json").read_text())
    assert set(record["agreement"]) == {"4.25", "3"}
    sides = {(row["budget"], row["source"]) for row in record["rows"]}
    counted = sum(found["sides"] for found in record["agreement"].values())
    assert len(sides) == len(record["rows"]) == counted
    assert all(row["measured_kl"] > 0 and row["expected_kl"] > 0 for row in record["rows"])
