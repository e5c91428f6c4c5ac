"""One run at a time in a working folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.progress import note

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11: JetPack 6.2 has 3.10

LOCK_FILE = ".skipcat.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


class FolderLock:
    """A folder that this process alone works in, until the end of a `with`.

    A lock whose process is dead is none: the kernel lets it go.

    Args:
        folder: exists, or is made with those above it.

    Attributes:
        folder: where it lies by now; to be set when it is renamed.

    Raises:
        UsageError: another process works in it; says which.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / LOCK_FILE
            with contextlib.suppress(FileNotFoundError):  # its folder was renamed just now
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._take()
                if self._is_at(path):
                    break
                os.close(self._file)
        with contextlib.suppress(OSError):  # a full disk: only the message below needs it
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        return self

    def _take(self) -> None:
        """Lock the open file, where the file system can."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._file, 20, 0).decode("ascii", "replace").strip()
            os.close(self._file)
            raise UsageError(
                "Another run is writing this output.",
                where=self.folder,
                observed=f"process {owner or 'unknown'}",
                change="wait for it, stop it, or choose another --output",
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            note(f"{self.folder}: its file system has no locks; start no second run into it")

    def _is_at(self, path: Path) -> bool:
        """Whether the file that is locked is the one that others will find."""
        return path.exists() and os.path.samestat(path.stat(), os.fstat(self._file))

    def __exit__(self, *_: object) -> None:
        """Remove the file, then let go: whoever opened it meanwhile looks again."""
        with contextlib.suppress(OSError):
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(self._file)
