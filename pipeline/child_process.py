"""Child processes of this checkout: to their end with a log, beside this one, or by JSON lines.

The child of the last kind answers by `answers_on_stdout`, or is no Python at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11: JetPack 6.2 has 3.10

_ROOT = Path(__file__).resolve().parents[1]
_SECONDS_TO_END = 20.0


class ChildEndedError(Exception):
    """A child ended where it should have answered.

    Args:
        status: as subprocess gives it: negative for a signal.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"signal {-status}" if status < 0 else f"status {status}")
        self.status = status


@dataclass(frozen=True)
class ChildEnd:
    """How a child process ended: its status as subprocess gives it, or the time limit."""

    status: int
    timed_out: bool


def environment(**changes: str) -> dict[str, str]:
    """That of this process, with this checkout first where Python looks for packages.

    The current folder, from which `python -m` and an empty part of PYTHONPATH would import, is left
    out: it may be a downloaded model's.
    """
    paths = [str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    safe = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    return {**os.environ, **safe, **changes}


def run_to_end(command: Sequence[str], log_path: Path, timeout_s: float) -> ChildEnd:
    """Run `command` with all its output in `log_path`; never leave it running.

    Args:
        command: program and arguments.
        log_path: file to write.
        timeout_s: seconds after which it is killed.
    """
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
        try:
            return ChildEnd(child.wait(timeout_s), timed_out=False)
        except subprocess.TimeoutExpired:
            return ChildEnd(_kill(child), timed_out=True)
        finally:
            # Ctrl-C lands here; TensorRT's C++ code would not notice it for minutes.
            if child.poll() is None:
                _kill(child)


@dataclass(frozen=True)
class EndBeside:
    """How a command of this checkout ended: its status, what it said on stderr, and its seconds."""

    status: int
    said: str
    seconds: float


class Beside:
    """Commands of skipcat, one after the other, while this process goes on.

    On leaving, what still runs is interrupted, and cleans up as after Ctrl-C.
    """

    def __init__(self) -> None:
        self._pool, self._lock = ThreadPoolExecutor(1), threading.Lock()
        self._child: subprocess.Popen[Any] | None = None
        self._is_left = False

    def add(self, *arguments: str) -> Future[EndBeside]:
        """Let `skipcat ARGUMENTS` run when those before it have ended."""
        return self._pool.submit(self._run, arguments)

    def _run(self, arguments: tuple[str, ...]) -> EndBeside:
        started = time.monotonic()
        with tempfile.TemporaryFile() as said:
            with self._lock:
                if self._is_left:
                    return EndBeside(-signal.SIGINT, "", 0.0)
                self._child = child = subprocess.Popen(
                    [sys.executable, "-m", "pipeline.cli.main", "--quiet", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env=environment(),
                    start_new_session=True,  # Ctrl-C comes by way of this process
                )
            status = child.wait()
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        return EndBeside(status, text, time.monotonic() - started)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_left = True
        if self._child is not None and self._child.poll() is None:
            # A program that a script began in the background ignores SIGINT, as do its children.
            is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            self._child.send_signal(signal.SIGTERM if is_deaf else signal.SIGINT)
            _ended(self._child)
        self._pool.shutdown(cancel_futures=True)


class JsonChild:
    """A child that reads requests from stdin and writes answers to stdout, one JSON object a line.

    What it writes to stderr goes where this process's goes.

    Args:
        command: program and arguments.
        own_session: Ctrl-C is for this process alone, which then ends the child.
    """

    def __init__(self, command: Sequence[str], *, own_session: bool = False) -> None:
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=own_session,
        )
        self.pid = self._process.pid

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            ChildEndedError: the child ended instead.
        """
        self.send(request)
        return self.hear()

    def send(self, request: dict[str, Any]) -> None:
        """Write one line; a child that is gone is found out by `hear`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next line.

        Raises:
            ChildEndedError: the child ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildEndedError(self._process.wait())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self, *, at_once: bool = False) -> int:
        """Have the child end, by the end of its input or `at_once` by a signal; its status.

        A child that does not end within some seconds is killed.
        """
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # of a line that a dead child never read
                    stream.close()
        return _kill(self._process) if at_once else _ended(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, at once if something failed."""
        self.close(at_once=error is not None)


def answers_on_stdout() -> Callable[[dict[str, Any]], None]:
    """What writes an answer to the parent; all else that is printed goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    return tell


def _ended(child: subprocess.Popen[Any]) -> int:
    """The status of a child that is about to end; it is killed where that takes too long."""
    try:
        return child.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        return _kill(child)


def _kill(child: subprocess.Popen[Any]) -> int:
    """Kill a child and return its status."""
    child.kill()
    return child.wait()
