"""Where on this machine the local models are that checkpoints were made from.

A checkpoint travels and names no path: it has the hashes of its original's files. Here is noted,
for the user's own machine, which folder had them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from pipeline.artefact import write_json
from pipeline.errors import InputError
from pipeline.json_file import read_json_object
from pipeline.known_hashes import cache_folder

_FILE = "origins.json"
_MOST = 1000


def remember_origin(files: Mapping[str, str], path: Path) -> None:
    """Note where files of these hashes are; nothing where there is no folder to note it in.

    Args:
        files: SHA-256 by name, as `model_hashes` gives them.
        path: of the model, a folder or a file.
    """
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        kept = {**_read(), _key(files): str(path.expanduser().resolve())}
        write_json(folder / _FILE, dict(list(kept.items())[-_MOST:]))


def known_origin(files: Mapping[str, str]) -> Path | None:
    """Where a model of these hashes was; None where that is not known, or nothing is there now."""
    known = _read().get(_key(files))
    path = Path(known) if isinstance(known, str) else None
    return path if path is not None and path.exists() else None


def _key(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def _read() -> dict[str, object]:
    try:
        return read_json_object(cache_folder() / _FILE)
    except (InputError, RuntimeError):
        return {}
