"""The process that holds TensorRT: `python -m pipeline.engine.worker request.json`.

A library that aborts, or that the kernel kills for its memory, takes only this process with it.
Everything TensorRT says goes to stderr, which the caller sends to `build.log`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import signal
import sys
from pathlib import Path

from pipeline.artefact import write_json
from pipeline.engine.worker_protocol import RESULT_FILE, WorkerRequest, WorkerResult
from pipeline.errors import PipelineError, explain
from pipeline.json_file import read_json_object
from pipeline.memory import peak_bytes

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Build what the request file says, beside it; return the exit status of `pipeline.errors`."""
    _die_with_parent()
    path = Path(arguments[0])
    request = WorkerRequest.from_json(read_json_object(path))
    try:
        result = _build(request, path.parent)
        result = dataclasses.replace(result, peak_memory_bytes=peak_bytes())
        write_json(path.with_name(RESULT_FILE), dataclasses.asdict(result))
    except Exception as failure:
        error = explain(failure)
        if error is None or error.exit_status == PipelineError.exit_status:
            raise
        # On a full disk there may be no room for the reason either; the status says which kind.
        with contextlib.suppress(OSError):
            reason = {"error": {"what": error.what, "details": error.details}}
            write_json(path.with_name(RESULT_FILE), reason)
        return error.exit_status
    return 0


def _build(request: WorkerRequest, staging: Path) -> WorkerResult:
    """Build with the flavour that the request names; only that library is imported."""
    if request.flavour == "rtx":
        from pipeline.engine import rtx

        return rtx.build(request, staging)
    from pipeline.engine import standard

    return standard.build(request, staging)


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent dies by a signal that it cannot pass on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
