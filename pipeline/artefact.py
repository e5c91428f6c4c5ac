"""Folders that appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, ResourceError, UsageError, path_of, shortage_of
from pipeline.folder_lock import LOCK_FILE, FolderLock
from pipeline.json_file import read_json_object
from pipeline.output import (
    MOVING,
    RECORDS,
    cannot_be_written,
    check_output,
    held_names,
    is_ours,
    names_in_motion,
    partial_path,
    real_path,
)
from pipeline.progress import note

_MEBIBYTE = 1 << 20


@contextlib.contextmanager
def staged_folder(
    output: Path,
    *,
    overwrite: bool = False,
    keep: bool = False,
    resume: bool = False,
    inputs: Iterable[object] = (),
    required_bytes: int = 0,
) -> Iterator[Path]:
    """Yield a working folder beside `output`; rename it to `output` if the body succeeds.

    Into a folder that is there and empty, which may be a mount point or the working directory, its
    files are moved instead, the record last. One process at a time works on an output.

    Args:
        output: folder to write; links are followed.
        overwrite: replace it if it is one that skipcat wrote.
        keep: what is unfinished stays when the body fails; otherwise it is removed.
        resume: take up what an earlier run left unfinished; otherwise that is removed.
        inputs: what is read; see `check_output`.
        required_bytes: that must be free.

    Raises:
        InputError: what an earlier run left is damaged.
        ResourceError: fewer than `required_bytes` are free, or the disk fills up.
        UsageError: see `check_output`; or another process is writing this output.
    """
    check_output(output, overwrite=overwrite, inputs=inputs)
    shown, output = output, real_path(output)
    require_free_bytes(output.parent, required_bytes)
    staging = partial_path(output)
    made = [path for path in staging.parents if not path.exists()]
    with _explaining(shown, (staging, output), resume=resume):
        _refuse_file(staging, resume=resume)
        with FolderLock(staging) as lock:
            kept = True
            try:
                _put_back(staging, output)
                check_output(output, overwrite=overwrite, inputs=inputs)  # now nobody changes it
                if not resume:
                    _discard_unfinished(staging, say=keep)
                kept = keep
                yield staging
            except BaseException:
                if not kept or not held_names(staging):
                    shutil.rmtree(staging, ignore_errors=True)
                    _remove_empty(made)
                raise
            _give_ordinary_modes(staging)
            _finish(staging, output, lock)


def _finish(staging: Path, output: Path, lock: FolderLock) -> None:
    """Put the finished folder where it belongs.

    Raises:
        UsageError: it cannot be put there; it stays where it is.
    """
    aside = _aside(output)
    try:
        if staging.parent == output:
            _move_out(staging, output)
            (staging / LOCK_FILE).unlink(missing_ok=True)
            staging.rmdir()
            return
        if output.exists():
            output.rename(aside)
        staging.rename(output)
    except OSError as error:
        if aside.exists() and not output.exists():
            aside.rename(output)
        raise UsageError(
            "The finished result cannot be put into its place.",
            where=output,
            observed=error.strerror,
            change=f"move it there yourself: it is whole in {staging}",
        ) from error
    lock.folder = output
    shutil.rmtree(aside, ignore_errors=True)


def _move_out(staging: Path, output: Path) -> None:
    """Move the files into the folder around them: the config late, a record last."""
    last = ("config.json", *RECORDS)
    names = [name for name in os.listdir(staging) if name not in (LOCK_FILE, MOVING)]
    names.sort(key=lambda name: (last.index(name) if name in last else -1, name))
    write_json(staging / MOVING, names)
    for name in names:
        (staging / name).rename(output / name)
    (staging / MOVING).unlink()


def _put_back(staging: Path, output: Path) -> None:
    """Undo what an earlier run began to move, and bring back what it had not replaced yet."""
    if staging.parent == output:
        for name in names_in_motion(staging):
            if (output / name).exists():
                (output / name).rename(staging / name)
        (staging / MOVING).unlink(missing_ok=True)
    aside = _aside(output)
    if aside.is_dir() and is_ours(aside):
        if output.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(output)


def _aside(output: Path) -> Path:
    """Where a folder that is replaced lies until its successor is in its place."""
    return output.with_name(f".{output.name}.replaced")


def _refuse_file(staging: Path, *, resume: bool) -> None:
    """Raise InputError for something else in the working folder's place, or remove it."""
    if staging.is_dir() or not os.path.lexists(staging):
        return
    if resume:
        raise damaged(staging, "a file, not a folder")
    staging.unlink()


def damaged(path: Path, reason: object) -> InputError:
    """The refusal to go on with something that an unfinished run did not leave like this."""
    return InputError(
        "What the unfinished run left is damaged.",
        where=path,
        observed=reason,
        change="start afresh without --resume",
    )


@contextlib.contextmanager
def _explaining(output: Path, written: tuple[Path, Path], *, resume: bool) -> Iterator[None]:
    """Say of a full disk, or of a path in the way, that it is the output's."""
    try:
        yield
    except Exception as error:
        shortage = shortage_of(error, output)
        if shortage is not None:
            raise shortage from error
        path = path_of(error)
        if path is None or not {path, *path.parents} & set(written):
            raise
        if resume and written[0] in path.parents:
            raise damaged(path, error) from error
        raise cannot_be_written(output, error) from error


def _discard_unfinished(staging: Path, *, say: bool) -> None:
    """Empty the working folder of an earlier run."""
    if say and held_names(staging):
        note(f"an unfinished run in {staging} is discarded (--resume continues one)")
    clear(staging)


def clear(folder: Path) -> None:
    """Remove all that a locked folder holds.

    Raises:
        ResourceError: it cannot be removed.
    """
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            discard(path)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _give_ordinary_modes(folder: Path) -> None:
    """Let files be read by whom the umask lets: libraries write some through private ones."""
    mask = os.umask(0o022)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | (0o666 & ~mask))


def require_same_settings(earlier: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that other settings began.

    Args:
        earlier: what the run was started with, as JSON holds it.
        now: what is asked for, likewise.
        folder: of the unfinished run, for the message.

    Raises:
        InputError: they differ; says in what.
    """
    if earlier == now:
        return
    changed = [name for name in now if earlier.get(name) != now[name]]
    raise InputError(
        "The unfinished run was started with other settings.",
        where=folder,
        observed=f"differs in {', '.join(changed) or 'its settings'}",
        change="repeat the earlier settings, or start afresh without --resume",
    )


def require_same_run(settings: dict[str, Any], record: Path) -> None:
    """Refuse to go on with a run that other settings began; note them if none did.

    Args:
        settings: what is asked for, as JSON holds it.
        record: the file in the unfinished folder that has those of the run.

    Raises:
        InputError: they differ; says in what. Or the file is damaged.
    """
    if not record.exists():
        write_json(record, settings)
        return
    try:
        earlier = read_json_object(record)
    except InputError as error:
        raise damaged(record, error) from error
    require_same_settings(earlier, settings, record.parent)


def discard(path: Path) -> None:
    """Remove a working folder or file, if there is one.

    Raises:
        ResourceError: it cannot be removed.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ResourceError("A working folder cannot be removed.", where=path) from error


def require_free_bytes(folder: Path, required_bytes: int) -> None:
    """Refuse to begin where it could not end.

    Raises:
        ResourceError: the file system of `folder` has fewer bytes free than required.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < required_bytes:
        raise ResourceError(
            "Not enough disk space.",
            where=existing,
            observed=f"{free_bytes / _MEBIBYTE:.0f} MiB free",
            expected=f"{required_bytes / _MEBIBYTE:.0f} MiB",
            change="free some space, or pass an --output on another disk",
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, aside and then renamed."""
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text`, aside and then renamed, so that a reader never sees half of it.

    What a process that was killed left aside is removed.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    for left in path.parent.glob(glob.escape(f".{path.name}.") + "[0-9]*"):
        if not _is_alive(left.name.rpartition(".")[2]):
            left.unlink(missing_ok=True)
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _is_alive(pid: str) -> bool:
    """Whether this is the number of a process, as far as can be told."""
    try:
        import psutil  # hardly ever needed, and not there on a board

        return not pid.isdecimal() or psutil.pid_exists(int(pid))
    except OverflowError:  # no process has such a number
        return False
    except ImportError:
        return True


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest is not there on Python 3.10, JetPack 6.2's
        while piece := file.read(_MEBIBYTE):
            digest.update(piece)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files below `folder`, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
