"""What is remembered is found again, and whatever is wrong with it costs only time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.remembered import Remembered

NOTES = Remembered("notes.json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_value_is_found_by_its_key_in_its_own_file() -> None:
    NOTES.set("a", {"b": [1]})
    NOTES.set("c", 2)
    assert (NOTES.get("a"), NOTES.get("c"), NOTES.get("d")) == ({"b": [1]}, 2, None)
    assert Remembered("others.json").get("a") is None


def test_of_two_who_find_out_the_same_both_go_on_with_the_first() -> None:
    NOTES.set("other", 0)
    assert NOTES.set_first("a", {"found": 1}) == {"found": 1}
    assert NOTES.set_first("a", {"found": 2}) == {"found": 1}
    assert (NOTES.get("a"), NOTES.get("other")) == ({"found": 1}, 0)


def test_the_oldest_of_very_many_is_forgotten(cache: Path) -> None:
    cache.mkdir()
    known = {"first": 1} | {str(n): n for n in range(999)}
    (cache / "notes.json").write_text(json.dumps(known))
    NOTES.set("last", 1)
    assert (NOTES.get("first"), NOTES.get("0"), NOTES.get("last")) == (None, 0, 1)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b""])
def test_a_broken_file_is_as_none_and_is_replaced(cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / "notes.json").write_bytes(content)
    assert NOTES.get("a") is None
    NOTES.set("a", 1)
    assert NOTES.get("a") == 1


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path / "file" / "below"))
    NOTES.set("a", 1)
    assert NOTES.set_first("b", 2) == 2
    assert (NOTES.get("a"), NOTES.get("b")) == (None, None)
