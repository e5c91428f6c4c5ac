"""Hashes of large files, computed once: remembered by what tells a file that was changed."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.artefact import sha256_of_file
from pipeline.remembered import Remembered

_HASHES = Remembered("sha256.json")


def known_sha256(path: Path, *, again: bool = False) -> str:
    """Hex SHA-256 of a file, read only if it was not before, or was changed since.

    Device, inode, size and time of change stay with a file that is renamed, not with a copy.

    Args:
        path: of the file.
        again: read it in any case.
    """
    key = _key(path)
    known = _HASHES.get(key)
    if isinstance(known, str) and not again:
        return known
    digest = sha256_of_file(path)
    if key == _key(path):
        _HASHES.set(key, digest)
    return digest


def remember_sha256(path: Path, digest: str) -> None:
    """Note the hash of a file; nothing where there is no folder to note it in."""
    _HASHES.set(_key(path), digest)


def _key(path: Path) -> str:
    status = path.stat()
    return json.dumps([status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns])
