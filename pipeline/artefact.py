"""Folders that appear whole or not at all: written aside, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, ResourceError, UsageError
from pipeline.progress import note

_MEBIBYTE = 1 << 20


def _partial_path(output: Path) -> Path:
    """Where the unfinished form of `output` is kept, in the same file system."""
    return output.parent / f".{output.name}.partial"


@contextlib.contextmanager
def staged_folder(
    output: Path, *, overwrite: bool = False, resume: bool = False, required_bytes: int = 0
) -> Iterator[Path]:
    """Yield an empty folder beside `output`; rename it to `output` if the body succeeds.

    With `resume` the unfinished folder of an earlier run is taken up, and it is kept when the body
    fails; otherwise a failure removes it.

    Raises:
        UsageError: `output` exists and `overwrite` is not set.
        ResourceError: fewer than `required_bytes` are free.
    """
    refuse_existing(output, overwrite=overwrite)
    _require_free_bytes(output.parent, required_bytes)
    staging = _partial_path(output)
    if staging.exists() and not resume:
        shutil.rmtree(staging)
    staging.mkdir(parents=True, exist_ok=True)
    try:
        yield staging
    except BaseException:
        if not resume:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    if output.exists():
        shutil.rmtree(output)
    staging.rename(output)


def discard_unfinished(output: Path, *, resume: bool) -> None:
    """Remove what an interrupted run left of `output`, and say so; keep it with `resume`.

    Raises:
        ResourceError: it cannot be removed.
    """
    staging = _partial_path(output)
    if staging.exists() and not resume:
        note(f"an unfinished run in {staging} is discarded (--resume continues one)")
        discard(staging)


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


def discard(folder: Path) -> None:
    """Remove a working folder, if there is one.

    Raises:
        ResourceError: it cannot be removed.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise ResourceError("A working folder cannot be removed.", where=folder) from error


def refuse_existing(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError when `output` holds something and may not be replaced."""
    if not output.exists() or overwrite:
        return
    if output.is_dir() and not any(output.iterdir()):
        return
    raise UsageError(
        "The output exists already.",
        where=output,
        change="pass --overwrite to replace it, or choose another --output",
    )


def _require_free_bytes(folder: Path, required_bytes: int) -> None:
    """Raise ResourceError when the file system of `folder` has fewer bytes free than required."""
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
    """Write `text`, aside and then renamed, so that a reader never sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Sum of the sizes of all files below `folder`, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation settings, or the image processor's settings."""
    patterns = (
        "tokenizer*", "special_tokens_map.json", "chat_template*", "*.jinja",
        "generation_config.json", "vocab.*", "merges.txt", "preprocessor_config.json",
        "added_tokens.json", "*.model", "processor_config.json",
    )  # fmt: skip
    for pattern in patterns:
        for path in filter(Path.is_file, checkpoint.glob(pattern)):
            shutil.copy2(path, folder / path.name)
