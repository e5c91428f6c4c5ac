"""The child in which steps of the GPU command run: requests on stdin, rows on stdout.

    {"rows", "device", "seed", "bytes_per_s", "done", "seconds"}    rows is `module:function`
        -> {"row", "holds"} for each row, then {"end"} or {"failed"}

A failed CUDA call can leave a process of no use, so the parent goes on with a new one.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from benchmarks.gpu.steps import Row, Setting, let_go
from pipeline.child_process import answers_on_stdout
from pipeline.errors import PipelineError

_TRACE_LINES = 12


def _serve(tell: Callable[[dict[str, Any]], None]) -> None:
    """Answer every request."""
    for line in sys.stdin:
        request = json.loads(line)
        step = request.pop("rows")
        setting = Setting(**request | {"done": frozenset(request["done"])})
        try:
            for name, holds in _rows(step, setting):
                tell({"row": name, "holds": holds})
        except Exception as error:  # of whatever kind: the parent notes it and goes on
            shown = str(error) if isinstance(error, PipelineError) else _trace()
            tell({"failed": shown})
            return
        let_go()
        tell({"end": step})


def _rows(step: str, setting: Setting) -> Iterator[Row]:
    """The rows of a step, by the name of its function."""
    module, _, function = step.partition(":")
    rows: Iterator[Row] = getattr(import_module(module), function)(setting)
    return rows


def _trace() -> str:
    """The end of the traceback of what is being handled."""
    return "\n".join(traceback.format_exc().strip().splitlines()[-_TRACE_LINES:])


if __name__ == "__main__":
    _serve(answers_on_stdout())
