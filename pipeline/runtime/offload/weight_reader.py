"""Reads of weight files that leave nothing in the page cache: O_DIRECT, into aligned buffers.

The files are the published ones: a layer's tensors lie side by side in them, so that no second copy
has to be made on disk. What is read begins and ends at multiples of the disk's blocks.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import InputError
from pipeline.progress import note

# Of offsets, lengths and addresses; disks ask for 512 or 4096.
ALIGNMENT = 4096
_AT_ONCE = 4 << 20
# What lies between two tensors is read with them, if it is no more than this.
_GAP = 64 << 10
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass(frozen=True)
class _Stretch:
    """Bytes of a file, and where they go.

    Attributes:
        file: its number.
        start: first byte in the file, a multiple of `ALIGNMENT`.
        size: bytes, a multiple of it.
        place: first byte in the buffer, likewise.
    """

    file: int
    start: int
    size: int
    place: int


@dataclass(frozen=True)
class Layout:
    """How some tensors are read into one buffer.

    Attributes:
        stretches: what is read.
        places: tensor -> its first byte in the buffer.
        size: bytes of the buffer.
    """

    stretches: tuple[_Stretch, ...]
    places: Mapping[str, int]
    size: int


def lay_out(tensors: Mapping[str, tuple[int, int, int]]) -> Layout:
    """As few stretches as hold all tensors.

    Args:
        tensors: name -> number of its file, its first byte there, and that behind its last.
    """
    stretches: list[_Stretch] = []
    places: dict[str, int] = {}
    for name, (file, start, stop) in sorted(tensors.items(), key=lambda item: item[1]):
        first = start // ALIGNMENT * ALIGNMENT
        last = -(-stop // ALIGNMENT) * ALIGNMENT
        known = stretches[-1] if stretches else None
        if known and known.file == file and start <= known.start + known.size + _GAP:
            size = max(known.size, last - known.start)
            stretches[-1] = _Stretch(file, known.start, size, known.place)
        else:
            place = known.place + known.size if known else 0
            stretches.append(_Stretch(file, first, last - first, place))
        own = stretches[-1]
        places[name] = own.place + start - own.start
    size = stretches[-1].place + stretches[-1].size if stretches else 0
    return Layout(tuple(stretches), places, size)


def aligned_buffer(size: int) -> np.ndarray:
    """uint8 [size] of memory that O_DIRECT can read into."""
    return np.frombuffer(mmap.mmap(-1, max(size, ALIGNMENT)), np.uint8)[:size]


class WeightReader:
    """Files that are read past the page cache, as long as the file system lets it.

    Args:
        paths: of the files.

    Attributes:
        direct: whether O_DIRECT is used; if not, what was read is dropped from the page cache.
        read_bytes: that the system has handed over so far.

    Raises:
        InputError: a file cannot be opened.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.direct, self.read_bytes = tuple(paths), True, 0
        self._files: list[int] = []
        try:
            for path in paths:
                self._files.append(self._open(path))
        except OSError as error:
            self.close()
            raise InputError(
                "A weight file cannot be read.", where=path, observed=error.strerror
            ) from error
        self._seen = [self._stamp(number) for number in range(len(self._files))]

    def read(
        self, layout: Layout, buffer: np.ndarray, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Fill a buffer as a layout says.

        Args:
            layout: what goes where.
            buffer: uint8, of `aligned_buffer`, at least `layout.size` long.
            stopped: asked now and then; true leaves the rest unread.

        Raises:
            InputError: a file is shorter than it was, was written to, or the disk fails.
        """
        for stretch in layout.stretches:
            view = buffer.data[stretch.place : stretch.place + stretch.size]
            try:
                self._read_stretch(stretch, view, stopped)
            except OSError as error:
                where = self.paths[stretch.file]
                raise InputError(
                    "The weights could not be read from the disk.",
                    where=where,
                    observed=f"{error.strerror}, at byte {stretch.start}",
                    change="check the disk; the next call tries again",
                ) from error
            if self._stamp(stretch.file) != self._seen[stretch.file]:
                raise InputError(
                    "A weight file was changed while the model was in use.",
                    where=self.paths[stretch.file],
                    change="open the model again",
                )

    def forget_pages(self) -> None:
        """Let the system drop what it holds of the files."""
        if hasattr(os, "posix_fadvise"):
            for file in self._files:
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def _open(self, path: Path) -> int:
        direct = getattr(os, "O_DIRECT", 0)
        if self.direct and direct:
            try:
                return os.open(path, os.O_RDONLY | direct)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        self._go_without(path)
        return os.open(path, os.O_RDONLY)

    def _go_without(self, path: Path) -> None:
        """Read by way of the page cache from now on, and say so."""
        if self.direct:
            note(f"{path.parent}: this file system has no O_DIRECT; pages are dropped once read")
        self.direct = False

    def _read_stretch(
        self, stretch: _Stretch, view: memoryview, stopped: Callable[[], bool]
    ) -> None:
        done, end = 0, self._seen[stretch.file][0] - stretch.start
        while done < len(view) and not stopped():
            got = self._read_block(stretch.file, stretch.start + done, view[done:])
            done += got
            if done >= end:  # of the file, whose last block is not whole
                break
            done -= done % ALIGNMENT
            if got < ALIGNMENT:
                raise InputError(
                    "A weight file is shorter than it was when the model was opened.",
                    where=self.paths[stretch.file],
                    observed=f"{stretch.start + done} bytes",
                    expected=f"{self._seen[stretch.file][0]} bytes",
                    change="copy the whole folder again, and open the model again",
                )
        if not self.direct:
            os.posix_fadvise(
                self._files[stretch.file], stretch.start, stretch.size, os.POSIX_FADV_DONTNEED
            )

    def _read_block(self, number: int, start: int, view: memoryview) -> int:
        try:
            got = os.preadv(self._files[number], [view[:_AT_ONCE]], start)
        except OSError as error:
            if not self.direct or error.errno not in _REFUSED:
                raise
            # Some file systems open what they then do not read.
            self._go_without(self.paths[number])
            for place, path in enumerate(self.paths):
                os.close(self._files[place])
                self._files[place] = os.open(path, os.O_RDONLY)
            got = os.preadv(self._files[number], [view[:_AT_ONCE]], start)
        self.read_bytes += got
        return got

    def _stamp(self, number: int) -> tuple[int, int]:
        """Size and time of the last change."""
        found = os.fstat(self._files[number])
        return found.st_size, found.st_mtime_ns
