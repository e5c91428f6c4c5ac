"""A hash is computed once for a file, and again for one that changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pipeline import known_hashes
from pipeline.known_hashes import known_sha256, remember_sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once_under_whatever_name(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = known_sha256(file)
    assert digest == sha256(file)
    monkeypatch.setattr(known_hashes, "sha256_of_file", lambda path: "read again")
    assert known_sha256(file.rename(file.with_name("renamed"))) == digest


@pytest.mark.parametrize("change", [b"weight", b"WEIGHTS"])
def test_a_file_that_changed_is_read_again(file: Path, change: bytes) -> None:
    known_sha256(file)
    file.write_bytes(change)
    os.utime(file, (1, 1))
    assert known_sha256(file) == sha256(file)


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"x": 5}'])
def test_a_broken_or_missing_cache_costs_nothing_but_time(
    file: Path, cache: Path, content: bytes
) -> None:
    assert known_sha256(file) == sha256(file)
    (cache / "sha256.json").write_bytes(content)
    assert known_sha256(file) == sha256(file)


def test_a_cache_that_cannot_be_written_is_done_without(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(file / "below-a-file"))
    remember_sha256(file, "x")
    assert known_sha256(file) == sha256(file)
