"""Turns every way the worker can end into a result or an explained error."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from pipeline.child_process import ChildEnd
from pipeline.engine.network import OUT_OF_MEMORY_WORDS
from pipeline.engine.worker_protocol import RESULT_FILE, WorkerResult
from pipeline.errors import InputError, PipelineError, ResourceError

LOG_FILE = "build.log"
_TAIL_LINES = 12
_TAIL_LINE_CHARACTERS = 400
_ERRORS_BY_STATUS = {3: InputError, 4: ResourceError}


def worker_command(request_path: Path) -> list[str]:
    """The command line of the worker."""
    return [sys.executable, "-m", "pipeline.engine.worker", str(request_path)]


def read_result(end: ChildEnd, staging: Path, timeout_s: float) -> WorkerResult:
    """The worker's result.

    Raises:
        InputError: the worker refused the request, or the library aborted on the graph.
        PipelineError: the worker failed for a reason it does not know.
        ResourceError: memory or the time limit ran out.
    """
    log = _read_tail(staging / LOG_FILE)
    if end.timed_out:
        raise ResourceError(
            "Building the engine took too long and was stopped.",
            observed=f"more than {timeout_s:.0f} s; last lines:\n{log}",
            change="give it more time with --timeout, or lower --max-prefill",
        )
    if end.status < 0:
        raise _killed_by(-end.status, log)
    answer = _read_answer(staging / RESULT_FILE)
    if end.status != 0 or "error" in answer:
        raise _refused(end.status, answer, log)
    answer["notes"] = tuple(answer["notes"])
    return WorkerResult(**answer)


def _read_answer(path: Path) -> dict[str, Any]:
    """The worker's JSON; empty when it wrote none."""
    if not path.is_file():
        return {}
    answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return answer


def _refused(status: int, answer: dict[str, Any], log: str) -> PipelineError:
    """The worker's own error again, or one with the log when it left none."""
    kind = _ERRORS_BY_STATUS.get(status, PipelineError)
    error = answer.get("error")
    if error is None:
        return kind(
            f"The engine worker failed with status {status}.",
            observed=f"last lines of its log:\n{log}",
            change="please report this with the log",
        )
    return kind(error["what"], **error["details"])


def _killed_by(number: int, log: str) -> PipelineError:
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


def _read_tail(path: Path) -> str:
    """Last lines of a log, indented, long ones cut; empty when there is none."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join(f"    {line[:_TAIL_LINE_CHARACTERS]}" for line in lines)
