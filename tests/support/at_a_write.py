"""A command that is killed, or whose disk fills up, at its n-th change of a folder.

    python -m tests.support.at_a_write FOLDER N ACTION ARGUMENT...

Changes are those that Python announces: files opened for writing, folders made, renames, removals.
ACTION is `kill`, `fill` (the file system of FOLDER), or `limit` (sizes of files to nothing), and
`count` prints how many changes there were.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")


class Watch:
    """Counts the changes below a folder, and acts at one of them."""

    def __init__(self, folder: str, place: int, action: str) -> None:
        self.folder, self.place, self.action, self.count = folder, place, action, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITING)
        if not changes or not str(arguments[0]).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.place:
            self.act()

    def act(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif self.action == "fill":
            with contextlib.suppress(OSError), Path(self.folder, "..filler").open("wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()


if __name__ == "__main__":
    from pipeline.cli.main import main

    watch = Watch(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    sys.addaudithook(watch)
    status = main(sys.argv[4:])
    if watch.action == "count":
        print(watch.count)
    sys.exit(status)
