"""Runs the worker, and turns every way it can end into a result or an explained error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.network import OUT_OF_MEMORY_WORDS
from pipeline.engine.worker_protocol import RESULT_FILE, WorkerResult
from pipeline.errors import InputError, PipelineError, ResourceError

LOG_FILE = "build.log"
TAIL_LINES = 12
TAIL_LINE_CHARACTERS = 400
ERRORS_BY_STATUS = {3: InputError, 4: ResourceError}
REPOSITORY_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ChildEnd:
    """How a child process ended: its status as subprocess gives it, or the time limit."""

    status: int
    timed_out: bool


def worker_command(request_path: Path) -> list[str]:
    """The command line of the worker."""
    return [sys.executable, "-m", "pipeline.engine.worker", str(request_path)]


def run_child(command: Sequence[str], log_path: Path, timeout_s: float) -> ChildEnd:
    """Run `command` with all its output in `log_path`; never leave it running.

    Args:
        command: program and arguments.
        log_path: file to write.
        timeout_s: seconds after which it is killed.
    """
    paths = [str(REPOSITORY_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            return ChildEnd(child.wait(timeout_s), timed_out=False)
        except subprocess.TimeoutExpired:
            return ChildEnd(kill(child), timed_out=True)
        finally:
            # Ctrl-C lands here; TensorRT's C++ code would not notice it for minutes.
            if child.poll() is None:
                kill(child)


def kill(child: subprocess.Popen[bytes]) -> int:
    """Kill a child and return its status."""
    child.kill()
    return child.wait()


def read_result(end: ChildEnd, staging: Path, timeout_s: float) -> WorkerResult:
    """The worker's result.

    Raises:
        InputError: the worker refused the request, or the library aborted on the graph.
        PipelineError: the worker failed for a reason it does not know.
        ResourceError: memory or the time limit ran out.
    """
    log = read_tail(staging / LOG_FILE)
    if end.timed_out:
        raise ResourceError(
            "Building the engine took too long and was stopped.",
            observed=f"more than {timeout_s:.0f} s; last lines:\n{log}",
            change="give it more time with --timeout, or lower --max-prefill",
        )
    if end.status < 0:
        raise killed_by(-end.status, log)
    answer = read_answer(staging / RESULT_FILE)
    if end.status != 0 or "error" in answer:
        raise refused(end.status, answer, log)
    answer["notes"] = tuple(answer["notes"])
    return WorkerResult(**answer)


def read_answer(path: Path) -> dict[str, Any]:
    """The worker's JSON; empty when it wrote none."""
    if not path.is_file():
        return {}
    answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return answer


def refused(status: int, answer: dict[str, Any], log: str) -> PipelineError:
    """The worker's own error again, or one with the log when it left none."""
    kind = ERRORS_BY_STATUS.get(status, PipelineError)
    error = answer.get("error")
    if error is None:
        return kind(
            f"The engine worker failed with status {status}.",
            observed=f"last lines of its log:\n{log}",
            change="please report this with the log",
        )
    return kind(error["what"], **error["details"])


def killed_by(number: int, log: str) -> PipelineError:
    """The error for a worker that a signal ended."""
    name = signal.Signals(number).name
    observed = f"{name}; last lines of its log:\n{log}"
    out_of_memory = any(word in log.lower() for word in OUT_OF_MEMORY_WORDS)
    if number == signal.SIGKILL or out_of_memory:
        return ResourceError(
            "The engine worker was killed, most likely because memory ran out.",
            observed=observed,
            change="close other programs, add swap, or lower --max-batch and --max-prefill; "
            "`dmesg` says whether the kernel's out-of-memory killer did it",
        )
    return InputError(
        "TensorRT aborted while it built this graph.",
        observed=observed,
        change="export again (--profile compat), build without --plugin, or try another TensorRT "
        "version",
    )


def read_tail(path: Path) -> str:
    """Last lines of a log, indented, long ones cut; empty when there is none."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join(f"    {line[:TAIL_LINE_CHARACTERS]}" for line in lines)
