from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from pipeline import artefact
from pipeline.errors import ResourceError, UsageError

RECORD = {"schema": 1, "provenance": {"tool": "skipcat"}}


class MakingFailed(Exception):
    pass


def fail_halfway(output: Path, **options: bool) -> None:
    with artefact.staged_folder(output, **options) as staging:
        (staging / "half.bin").write_bytes(b"half")
        raise MakingFailed


def make(output: Path, text: str = "whole", **options: bool) -> None:
    with artefact.staged_folder(output, **options) as staging:
        (staging / "file.txt").write_text(text)
        artefact.write_json(staging / "export.json", RECORD)


def test_success_makes_the_output_appear_and_leaves_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with artefact.staged_folder(output) as staging:
        assert not output.exists()
        (staging / "file.txt").write_text("whole")
    assert (output / "file.txt").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [output]


def test_missing_parents_are_created(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "file.txt").exists()


def test_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(MakingFailed):
        fail_halfway(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    make(output, "old")
    with pytest.raises(MakingFailed):
        fail_halfway(output, overwrite=True)
    assert (output / "file.txt").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    make(output, "old")
    (output / "stale.txt").write_text("stale")
    make(output, "new", overwrite=True)
    assert {path.name for path in output.iterdir()} == {"file.txt", "export.json"}
    assert (output / "file.txt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [output]


def test_resume_keeps_what_was_finished_and_takes_it_up(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(MakingFailed):
        fail_halfway(output, keep=True)
    assert not output.exists()
    with artefact.staged_folder(output, resume=True) as staging:
        assert (staging / "half.bin").read_bytes() == b"half"
    assert (output / "half.bin").exists()


def test_without_resume_an_earlier_unfinished_run_is_discarded(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(MakingFailed):
        fail_halfway(output, keep=True)
    make(output)
    assert {path.name for path in output.iterdir()} == {"file.txt", "export.json"}


def test_existing_output_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    output = tmp_path / "out"
    make(output, "old")
    with pytest.raises(UsageError, match="exists already") as caught:
        make(output, "new")
    assert str(output) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert (output / "file.txt").read_text() == "old"


def test_empty_folder_is_not_in_the_way(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    make(output)
    assert (output / "file.txt").exists()


def test_too_little_disk_names_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 << 20))
    with (
        pytest.raises(ResourceError, match="100 MiB free") as caught,
        artefact.staged_folder(tmp_path / "out", required_bytes=200 << 20),
    ):
        pass
    assert "200 MiB" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_json_is_written_whole_and_leaves_no_second_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    artefact.write_json(path, {"b": 1, "a": [2]})
    artefact.write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_hash_and_size_are_those_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"abc")
    (tmp_path / "b.bin").write_bytes(b"defgh")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert artefact.sha256_of_file(tmp_path / "sub" / "a.bin") == expected
    assert artefact.folder_bytes(tmp_path) == 8
