"""What may be found out again, kept in small files of the user's cache folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.artefact import write_json
from pipeline.errors import InputError
from pipeline.json_file import read_json_object

_MOST = 1000


def cache_folder() -> Path:
    """What may be made again: `SKIPCAT_CACHE`, or `skipcat` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    chosen = os.environ.get("SKIPCAT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(base) / "skipcat"


@dataclass(frozen=True)
class Remembered:
    """Values by key, the latest thousand; lost without harm, and by nobody but the user changed.

    Attributes:
        file: its name in the cache folder.
    """

    file: str

    def get(self, key: str) -> object:
        """The value; None where none is known, where the file is broken, or there is no folder."""
        return self._read().get(key)

    def set(self, key: str, value: object) -> None:
        """Remember a value that JSON can hold; nothing where there is no folder to do it in."""
        with contextlib.suppress(OSError, RuntimeError):
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            kept = list({**self._read(), key: value}.items())[-_MOST:]
            write_json(folder / self.file, dict(kept))

    def set_first(self, key: str, value: object) -> object:
        """What is remembered from now on: this value, or that of whoever found one out before.

        Two processes that find out the same at one time so go on with the same, and neither loses
        what the other remembers meanwhile.
        """
        from filelock import FileLock

        with contextlib.suppress(OSError, RuntimeError):
            folder = cache_folder()
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{self.file}.lock"):
                known = self.get(key)
                if known is not None:
                    return known
                self.set(key, value)
        return value

    def _read(self) -> dict[str, object]:
        try:
            return read_json_object(cache_folder() / self.file)
        except (InputError, RuntimeError):
            return {}
