"""Tasks, and who computes them: this process, others of this machine, or a Ray cluster (WORKERS).

A task is a function of a module, and arguments that are numbers, tensors, arrays and dataclasses of
these; it opens no file and changes no argument. So it gives the same bytes wherever it is computed,
if as many threads compute it: every process of a run has the same number.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pipeline.errors import UsageError
from pipeline.lazy import imported
from pipeline.machine import allowed_threads, limited_threads, product_threads

Value = TypeVar("Value")
_Made = TypeVar("_Made", covariant=True)
_Key = TypeVar("_Key")
_CLUSTER = "pipeline.workers.ray_workers:opened"
_EXPECTED = "local, local:4, auto for the Ray cluster this machine belongs to, or ray://HOST:10001"


class Result(Protocol[_Made]):
    """What a task will have returned."""

    def get(self) -> _Made:
        """Wait for it.

        Raises:
            PipelineError: the task could not be computed; names what it is of.
            Exception: whatever the function itself raised.
        """
        ...


class Workers(Protocol):
    """Who computes.

    Attributes:
        at_once: tasks that are worth having submitted before the first is waited for; 0 where each
            is computed as it is submitted.
    """

    at_once: int

    def submit(
        self, where: str, function: Callable[..., Value], *arguments: Any, needed_bytes: int = 0
    ) -> Result[Value]:
        """Let a task be computed.

        Args:
            where: what it is of, for messages.
            function: of a module.
            arguments: that it is given; they must not change until the result is there. A result
                of another task stands for what that returns, and is not moved through this process.
            needed_bytes: memory that it takes beside its arguments; 0 where nobody knows.

        Raises:
            PipelineError: nobody can compute it.
        """
        ...

    def submit_parts(
        self,
        where: str,
        function: Callable[..., Sequence[Any]],
        count: int,
        *arguments: Any,
        needed_bytes: int = 0,
    ) -> list[Result[Any]]:
        """Let a task be computed that returns so many values, each of which goes its own way.

        Args and errors as of `submit`.
        """
        ...

    def share(self, value: Value) -> Result[Value]:
        """What several tasks are given, moved once: an argument of `submit`."""
        ...

    def describe(self) -> dict[str, Any]:
        """What report.json says of who computed."""
        ...


@dataclass(frozen=True)
class Done(Generic[Value]):
    """What was computed here (see `Result`)."""

    value: Value

    def get(self) -> Value:
        return self.value


class InProcess:
    """Computes each task as it is submitted; what inherits may watch `compute`."""

    at_once = 0

    def compute(self, where: str, function: Callable[..., Value], *given: Any) -> Value:
        """What a task returns; nothing it is given is a result any more."""
        return function(*given)

    def submit(
        self, where: str, function: Callable[..., Value], *arguments: Any, needed_bytes: int = 0
    ) -> Result[Value]:
        return Done(self._computed(where, function, arguments))

    def submit_parts(
        self,
        where: str,
        function: Callable[..., Sequence[Any]],
        count: int,
        *arguments: Any,
        needed_bytes: int = 0,
    ) -> list[Result[Any]]:
        parts = self._computed(where, function, arguments)
        assert len(parts) == count, f"{where} returned {len(parts)} values, not {count}"
        return [Done(part) for part in parts]

    def share(self, value: Value) -> Result[Value]:
        return Done(value)

    def describe(self) -> dict[str, Any]:
        return {}

    def _computed(
        self, where: str, function: Callable[..., Value], arguments: Sequence[Any]
    ) -> Value:
        given = (one.value if isinstance(one, Done) else one for one in arguments)
        return self.compute(where, function, *given)


IN_PROCESS: Workers = InProcess()


class InOrder(Generic[_Key, Value]):
    """Results that are waited for in the order of their tasks, while later ones are computed.

    Args:
        workers: who computes; as many tasks as they want at once are left waiting.
        take: is given a key and the values of its tasks.
    """

    def __init__(self, workers: Workers, take: Callable[[_Key, list[Value]], None]) -> None:
        self._workers, self._take_values = workers, take
        self._waiting: deque[tuple[_Key, Sequence[Result[Value]]]] = deque()

    def add(self, key: _Key, results: Sequence[Result[Value]]) -> None:
        """Add tasks that belong together; takes the oldest while too many are waiting."""
        self._waiting.append((key, results))
        while sum(len(others) for _, others in self._waiting) > self._workers.at_once:
            self._take()

    def finish(self) -> None:
        """Take all that are waiting."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        key, results = self._waiting.popleft()
        self._take_values(key, [result.get() for result in results])


@contextlib.contextmanager
def open_workers(place: str | None) -> Iterator[Workers]:
    """Inside, whoever `--workers` names computes, and this process with as many threads as each.

    Args:
        place: `local`, `local:COUNT`, `auto` or `ray://HOST:PORT`; None for this process alone.

    Raises:
        UsageError: another place.
        PipelineError: Ray is not installed, or nobody answers there.
    """
    if place is None:
        yield IN_PROCESS
        return
    found = re.fullmatch(r"local(?::([1-9]\d{0,3}))?|auto|ray://[^\s/]+:\d+", place)
    if found is None:
        raise UsageError(
            "There are no such workers.", where="--workers", observed=place, expected=_EXPECTED
        )
    threads = allowed_threads() or 1
    count = None
    if place.startswith("local"):
        count = int(found[1]) if found[1] else max(1, product_threads() // threads)
        threads = allowed_threads() or max(1, product_threads() // count)
    with limited_threads(threads), imported(_CLUSTER)(place, count, threads) as workers:
        yield workers
