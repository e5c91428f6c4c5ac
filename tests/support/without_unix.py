"""A process without what Windows has not: `python without_unix.py main ARGUMENTS` and other verbs.

What it has instead, `msvcrt.locking`, is made here out of `fcntl`.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess  # which takes a machine with `msvcrt` for Windows  # noqa: F401
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # likewise  # noqa: F401

MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp")
# SIGKILL is left: this system's `subprocess` and psutil kill by it.
NAMES: dict[Any, tuple[str, ...]] = {
    os: (
        "O_CLOEXEC", "POSIX_FADV_DONTNEED", "fork", "getloadavg", "pathconf", "posix_fadvise",
        "pread", "preadv", "pwrite", "sched_getaffinity",
    ),
    signal: ("ITIMER_PROF", "ITIMER_REAL", "SIGALRM", "SIGPROF", "pthread_sigmask", "setitimer"),
}  # fmt: skip
# Of the template's own process, which is started afresh.
_CHILD = "import signal, sys; del signal.setitimer; sys.modules['resource'] = None;"


def become_windows() -> None:
    """Take away what Windows has not, and give `msvcrt` what locks need."""
    sys.modules["msvcrt"] = _make_msvcrt()
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in NAMES.items():
        for name in names:
            delattr(module, name)


def _make_msvcrt() -> types.ModuleType:
    """Locks of bytes from where a file stands, which end with the process, as Windows has them."""
    import fcntl

    module: Any = types.ModuleType("msvcrt")
    module.LK_NBLCK = 2

    def locking(file: int, mode: int, count: int) -> None:
        assert mode == module.LK_NBLCK
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)
        except BlockingIOError as error:
            raise PermissionError(13, "Permission denied") from error

    module.locking = locking
    made: types.ModuleType = module
    return made


def _main(*arguments: str) -> int:
    """What `skipcat` does there."""
    from pipeline.cli.main import main

    return main(list(arguments))


def _import(*names: str) -> int:
    for name in names:
        importlib.import_module(name)
    return 0


def _hold(output: str) -> int:
    """Work on an output until stdin ends."""
    from pipeline.artefact import staged_folder

    with staged_folder(Path(output), keep=True) as folder:
        (folder / "half.txt").write_text("half")
        print("held", flush=True)
        sys.stdin.read()
    return 0


def _render(source: str, processor_s: str, wall_s: str) -> int:
    """Render a template within limits, and a harmless conversation after it."""
    from pipeline.errors import InputError
    from pipeline.runtime import chat_template

    chat_template._START = _CHILD + chat_template._START
    chat_template._PROCESSOR_S, chat_template._WALL_S = float(processor_s), float(wall_s)
    template = chat_template._ChatTemplate(
        "{% if messages|length > 1 %}" + source + "{% endif %}fine"
    )
    message = {"role": "user", "content": "hi"}
    for count in (1, 2, 1):
        try:
            print(template.render([message] * count, True, {}))
        except InputError as error:
            print(error.details["observed"])
    return 0


if __name__ == "__main__":
    become_windows()
    verbs: dict[str, Callable[..., int]] = {
        "main": _main,
        "import": _import,
        "hold": _hold,
        "render": _render,
    }
    sys.exit(verbs[sys.argv[1]](*sys.argv[2:]))
