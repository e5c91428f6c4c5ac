"""A weight file mapped into memory, whose pages leave the process once they have been packed.

ONNX Runtime's kernels keep the matrices in a layout of their own, so what was read from the file is
needed once. The pages are clean: releasing one costs nothing but reading it again.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How long read pages may pile up while a session packs them.
_INTERVAL_S = 0.01


class MappedWeights:
    """A file of external data, mapped; its memory must outlive the sessions over it.

    Args:
        path: a file that is not empty.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        with path.open("rb") as file:
            self.pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def release_pages(self) -> None:
        """Take the file's pages out of the process; they come again when they are read."""
        self.pages.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def releasing_pages(self) -> Iterator[None]:
        """Release pages again and again while the body reads the file, and at its end."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_INTERVAL_S):
                self.release_pages()

        watcher = threading.Thread(target=watch, name="weights", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            self.release_pages()


def map_weights(path: Path) -> MappedWeights | None:
    """The file mapped; None where there is none, or where the system cannot take pages back."""
    if not hasattr(mmap, "MADV_DONTNEED") or not path.is_file() or not path.stat().st_size:
        return None
    return MappedWeights(path)
