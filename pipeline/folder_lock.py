"""One run at a time in a working folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from pipeline.progress import note

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11: JetPack 6.2 has 3.10

# Windows has the one, everything else the other.
fcntl: Any
msvcrt: Any
try:
    import fcntl
except ImportError:
    fcntl = None
    import msvcrt

LOCK_FILE = ".skipcat.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
# Of a byte that is not there: on Windows nobody else can read what is locked, and the number of the
# process is to be read.
_LOCKED_BYTE = 1 << 30
_LONGEST_NUMBER = 20


class FolderLock:
    """A folder that this process alone works in, until the end of a `with`.

    A lock whose process is dead is none: the kernel lets it go. Its file lies in the folder; on
    Windows, where a folder that holds an open file cannot be renamed, beside it.

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
        path = self._path(self.folder)
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # its folder was renamed just now
                # Python's own files are not inherited; on Windows bytes are to stay as they are.
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0))
                self._take()
                if self._is_at(path):
                    break
                os.close(self._file)
        self._beside = None if fcntl else path
        with contextlib.suppress(OSError):  # a full disk: only the message below needs it
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, f"{os.getpid()}\n".encode())
        return self

    @staticmethod
    def _path(folder: Path) -> Path:
        return folder / LOCK_FILE if fcntl else folder.with_name(f"{LOCK_FILE}.{folder.name}")

    def _take(self) -> None:
        """Lock the open file, where the file system can."""
        try:
            _lock(self._file)
        except (BlockingIOError, PermissionError) as error:
            os.lseek(self._file, 0, os.SEEK_SET)
            owner = os.read(self._file, _LONGEST_NUMBER).decode("ascii", "replace").strip()
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
        """Remove the file, then let go: whoever opened it meanwhile looks again.

        On Windows the other way round: a file that is open, here or elsewhere, is not removed.
        """
        if self._beside is not None:
            os.close(self._file)
        with contextlib.suppress(OSError):
            (self._beside or self.folder / LOCK_FILE).unlink(missing_ok=True)
        if self._beside is None:
            os.close(self._file)


def _lock(file: int) -> None:
    """Lock an open file for this process.

    Raises:
        BlockingIOError: another process has it; on Windows PermissionError.
        OSError: its file system has no locks.
    """
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
