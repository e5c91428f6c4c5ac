"""The parent's end of a measuring process."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from pipeline.child_process import ChildEndedError, JsonChild
from pipeline.errors import InputError, PipelineError, ResourceError, UsageError

_ERRORS = {error.exit_status: error for error in (UsageError, InputError, ResourceError)}


class Child:
    """A process that runs `pipeline.bench.child`.

    Args:
        label: for messages.
        target: what it opens, see `pipeline.bench.child.open_target`.
    """

    def __init__(self, label: str, target: dict[str, Any]) -> None:
        self.label = label
        command = [sys.executable, "-m", "pipeline.bench.child"]
        self._process = JsonChild(command, own_session=True)
        self._process.send(target)
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
        self._process.send(request)
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        try:
            answer = self._process.hear()
        except ChildEndedError as end:
            raise self._explained(end) from end
        error = answer.get("error")
        if error is not None:
            raise _ERRORS.get(error["status"], PipelineError)(error["what"], **error["details"])
        return answer

    def _explained(self, end: ChildEndedError) -> PipelineError:
        if end.status < 0:
            return ResourceError(
                "A measuring process was killed, most likely for lack of memory.",
                where=self.label,
                observed=end,
                change="measure fewer models at once, or a smaller one",
            )
        return PipelineError(
            "A measuring process ended.", where=self.label, observed=f"{end}; see above"
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
        self._process.__exit__(kind, error, trace)
