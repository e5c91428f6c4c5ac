"""The parent's end of a measuring process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import InputError, PipelineError, ResourceError, UsageError

REPOSITORY_ROOT = Path(__file__).resolve().parents[2]
ERRORS = {error.exit_status: error for error in (UsageError, InputError, ResourceError)}
SECONDS_TO_END = 20


class Child:
    """A process that runs `pipeline.bench.child`.

    Args:
        label: for messages.
        target: what it opens, see `pipeline.bench.child.open_target`.
    """

    def __init__(self, label: str, target: dict[str, Any]) -> None:
        self.label = label
        paths = [str(REPOSITORY_ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends this one
        )
        self._send(target)
        self.ready: dict[str, Any] = {}

    def wait_until_open(self) -> None:
        """Read what the child says of its target into `ready`.

        Raises:
            PipelineError: what it refused the target for, of the child's own class.
        """
        self.ready = self._hear()

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer.

        Raises:
            PipelineError: the child's own.
            ResourceError: something killed it.
        """
        self._send(request)
        return self._hear()

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._hear()  # says why it ended

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        error = answer.get("error")
        if error is not None:
            raise ERRORS.get(error["status"], PipelineError)(error["what"], **error["details"])
        return answer

    def _ended(self) -> PipelineError:
        status = self._process.wait()
        if status < 0:
            return ResourceError(
                "A measuring process was killed, most likely for lack of memory.",
                where=self.label,
                observed=f"signal {-status}",
                change="measure fewer models at once, or a smaller one",
            )
        return PipelineError(
            "A measuring process ended.", where=self.label, observed=f"status {status}; see above"
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, at once if something failed."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # of a line that a dead child never read
                    stream.close()
        if error is not None:
            self._process.kill()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
