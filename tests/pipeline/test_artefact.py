from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import artefact
from pipeline.errors import InputError, ResourceError, UsageError

RECORD = {"schema": 1, "provenance": {"tool": "skipcat"}}


class MakingFailed(Exception):
    pass


def fail_halfway(output: Path, **options: Any) -> None:
    with artefact.staged_folder(output, **options) as staging:
        (staging / "half.bin").write_bytes(b"half")
        raise MakingFailed


def make(output: Path, text: str = "whole", **options: Any) -> None:
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


@pytest.mark.parametrize("way", ["working directory", "link", "folder"])
def test_an_empty_folder_that_is_there_is_filled_and_stays_the_same(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    before = real.stat().st_ino
    output = real
    if way == "working directory":
        monkeypatch.chdir(real)
        output = Path()
    elif way == "link":
        output = tmp_path / "link"
        output.symlink_to("real")
    with pytest.raises(MakingFailed):
        fail_halfway(output, keep=True)
    with artefact.staged_folder(output, resume=True) as staging:
        assert (staging / "half.bin").read_bytes() == b"half"
    assert {path.name for path in real.iterdir()} == {"half.bin"}
    assert real.stat().st_ino == before


def test_a_mount_point_is_filled_and_never_replaced(tmp_path: Path) -> None:
    output = tmp_path / "mount"
    output.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", output], check=False).returncode:
        pytest.skip("may not mount")
    try:
        make(output)
        with pytest.raises(UsageError, match="mount point"):
            make(output, overwrite=True)
        with pytest.raises(UsageError, match="mount point"):
            make_above(tmp_path)
        assert {path.name for path in output.iterdir()} == {"file.txt", "export.json"}
    finally:
        subprocess.run(["umount", output], check=True)


def make_above(folder: Path) -> None:
    artefact.write_json(folder / "export.json", RECORD)
    make(folder, overwrite=True)


def test_moving_into_a_folder_that_was_stopped_halfway_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, moved = Path.rename, []

    def stop_at_second(path: Path, target: Path) -> Path:
        if path.parent.name == ".skipcat.partial":
            moved.append(path.name)
            if len(moved) == 2:
                raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    assert moved == ["file.txt", "export.json"]  # the record last
    assert not (tmp_path / "export.json").exists()
    make(tmp_path, "again")
    assert {path.name for path in tmp_path.iterdir()} == {"file.txt", "export.json"}
    assert (tmp_path / "file.txt").read_text() == "again"


@pytest.mark.parametrize("failure", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()])
def test_an_old_output_is_not_lost_when_the_new_one_cannot_be_put_there(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    make(output, "old")
    rename = Path.rename

    def fail_at_the_new_one(path: Path, target: Path) -> Path:
        if path.name == ".out.partial":
            raise failure
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_at_the_new_one)
        with pytest.raises((UsageError, KeyboardInterrupt)):
            make(output, "new", overwrite=True)
    with pytest.raises(UsageError, match="exists already"):
        make(output, "other")
    assert (output / "file.txt").read_text() == "old"
    make(output, "newest", overwrite=True)
    assert (output / "file.txt").read_text() == "newest"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        with artefact.staged_folder(tmp_path / "out") as staging:
            (staging / "private.bin").write_bytes(b"x")
            (staging / "private.bin").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "private.bin").stat().st_mode & 0o777 == 0o666 & ~mask


def fill_the_disk(staging: Path) -> None:
    raise OSError("13056 requested and 0 written")


def lose_a_folder(staging: Path) -> None:
    (staging / "layers").write_text("a file")
    (staging / "layers").joinpath("0.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("work", "resume", "kind"),
    [
        (fill_the_disk, False, ResourceError),
        (lose_a_folder, True, InputError),
        (lose_a_folder, False, UsageError),
    ],
)
def test_what_goes_wrong_below_the_output_is_told_as_the_outputs(
    work: Callable[[Path], None], resume: bool, kind: type[Exception], tmp_path: Path
) -> None:
    with (
        pytest.raises(kind, match=str(tmp_path)),
        artefact.staged_folder(tmp_path / "out", resume=resume) as staging,
    ):
        work(staging)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_working_folders_place_is_said_to_be_damage(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").write_text("no folder")
    with (
        pytest.raises(InputError, match="without --resume"),
        artefact.staged_folder(tmp_path / "out", resume=True),
    ):
        pass
    make(tmp_path / "out")
    assert (tmp_path / "out" / "file.txt").exists()


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


def test_what_a_killed_writer_left_aside_is_removed(
    tmp_path: Path,
) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    others = [tmp_path / f".a.json.{pid}" for pid in (os.getppid(), "x", "3.old")]
    for path in (tmp_path / f".a.json.{dead.pid}", tmp_path / f".a.json.{10**30}", *others):
        path.write_text("half")
    artefact.write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *(path.name for path in others)}
