"""Hashes of large files, computed once: remembered by what tells a file that was changed."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from pipeline.artefact import sha256_of_file, write_json
from pipeline.errors import InputError
from pipeline.json_file import read_json_object

_FILE = "sha256.json"
_MOST = 1000


def cache_folder() -> Path:
    """What may be made again: `SKIPCAT_CACHE`, or `skipcat` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    chosen = os.environ.get("SKIPCAT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "skipcat"


def known_sha256(path: Path, *, again: bool = False) -> str:
    """Hex SHA-256 of a file, read only if it was not before, or was changed since.

    Device, inode, size and time of change stay with a file that is renamed, not with a copy.

    Args:
        path: of the file.
        again: read it in any case.
    """
    key = _key(path)
    known = _read().get(key)
    if isinstance(known, str) and not again:
        return known
    digest = sha256_of_file(path)
    if key == _key(path):
        remember_sha256(path, digest)
    return digest


def remember_sha256(path: Path, digest: str) -> None:
    """Note the hash of a file; nothing where there is no folder to note it in."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        kept = list({**_read(), _key(path): digest}.items())[-_MOST:]
        write_json(folder / _FILE, dict(kept))


def _key(path: Path) -> str:
    status = path.stat()
    return json.dumps([status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns])


def _read() -> dict[str, object]:
    """What is noted; nothing where there is no such file, or a broken one."""
    try:
        return read_json_object(cache_folder() / _FILE)
    except (InputError, RuntimeError):
        return {}
