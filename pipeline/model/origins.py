"""Where on this machine the local models are that checkpoints were made from.

A checkpoint travels and names no path: it has the hashes of its original's files. Here is noted,
for the user's own machine, which folder had them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.remembered import Remembered

_ORIGINS = Remembered("origins.json")


def remember_origin(files: Mapping[str, str], path: Path) -> None:
    """Note where files of these hashes are; nothing where there is no folder to note it in.

    Args:
        files: SHA-256 by name, as `model_hashes` gives them.
        path: of the model, a folder or a file.
    """
    _ORIGINS.set(_key(files), str(path.expanduser().resolve()))


def known_origin(files: Mapping[str, str]) -> Path | None:
    """Where a model of these hashes was; None where that is not known, or nothing is there now."""
    known = _ORIGINS.get(_key(files))
    path = Path(known) if isinstance(known, str) else None
    return path if path is not None and path.exists() else None


def _key(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()
