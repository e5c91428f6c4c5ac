"""Where a checkpoint's original was is known on the machine that made it, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.model.origins import known_origin, remember_origin

FILES = {"model.safetensors": "ab", "config.json": "cd"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path / "cache"))


def test_a_model_is_found_again_by_the_hashes_of_its_files(tmp_path: Path) -> None:
    assert known_origin(FILES) is None
    remember_origin(FILES, tmp_path)
    assert known_origin(dict(reversed(FILES.items()))) == tmp_path.resolve()
    assert known_origin(FILES | {"config.json": "ce"}) is None


def test_a_model_that_is_gone_and_notes_that_are_broken_are_passed_over(tmp_path: Path) -> None:
    remember_origin(FILES, tmp_path / "gone")
    assert known_origin(FILES) is None
    (tmp_path / "cache" / "origins.json").write_text("[")
    assert known_origin(FILES) is None
    remember_origin(FILES, tmp_path)
    assert known_origin(FILES) == tmp_path.resolve()


def test_a_cache_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path / "file" / "below"))
    remember_origin(FILES, tmp_path)
    assert known_origin(FILES) is None
