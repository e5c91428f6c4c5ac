"""The process that holds TensorRT: `python -m pipeline.engine.worker request.json [inspect]`.

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
from typing import Any

from pipeline.artefact import write_json
from pipeline.engine.inspect_plan import inspect_plan
from pipeline.engine.target import load_library
from pipeline.engine.worker_protocol import (
    LAYERS_FILE,
    PLAN_FILE,
    RESULT_FILE,
    WorkerRequest,
    WorkerResult,
)
from pipeline.errors import PipelineError, explain
from pipeline.json_file import read_json_object
from pipeline.memory import peak_bytes

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Do what the request file says, beside it; return the exit status of `pipeline.errors`.

    Args:
        arguments: the file; and `inspect` to read back the plan that lies beside it.
    """
    _die_with_parent()
    path, verb = Path(arguments[0]), arguments[1:]
    request = WorkerRequest.from_json(read_json_object(path))
    answer = path.with_name(LAYERS_FILE if verb else RESULT_FILE)
    try:
        write_json(answer, _inspect(request, path.parent) if verb else _built(request, path.parent))
    except Exception as failure:
        error = explain(failure)
        if error is None or error.exit_status == PipelineError.exit_status:
            raise
        # On a full disk there may be no room for the reason either; the status says which kind.
        with contextlib.suppress(OSError):
            write_json(answer, {"error": {"what": error.what, "details": error.details}})
        return error.exit_status
    return 0


def _built(request: WorkerRequest, staging: Path) -> dict[str, Any]:
    """The result of a build, with the memory that it took."""
    result = _build(request, staging)
    return dataclasses.asdict(dataclasses.replace(result, peak_memory_bytes=peak_bytes()))


def _inspect(request: WorkerRequest, staging: Path) -> dict[str, Any]:
    """What the plan holds; of one that another program made, its shapes are held to the request."""
    library = load_library(request.flavour, "read an engine back")
    if request.plugin is not None:
        from pipeline.engine.standard import load_plugin

        load_plugin(library, request.plugin)
    profiles = request.profiles if request.adopted else ()
    return inspect_plan(library, staging / PLAN_FILE, profiles)


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
