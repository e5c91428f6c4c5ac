"""Workers that are this process: what they are given and return is pickled on the way."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.workers.workers import Done, InProcess, Result, resolved


class Elsewhere(InProcess):
    """Computes what is pickled and unpickled, as in another process.

    Attributes:
        asked: what the tasks were of.
    """

    at_once = 2

    def __init__(self) -> None:
        self.asked: list[str] = []

    def submit(
        self, where: str, function: Callable[..., Any], *arguments: Any, needed_bytes: int = 0
    ) -> Result[Any]:
        self.asked.append(where)
        return Done(_moved(function(*_moved(resolved(arguments)))))

    def submit_parts(
        self,
        where: str,
        function: Callable[..., Sequence[Any]],
        count: int,
        *arguments: Any,
        needed_bytes: int = 0,
    ) -> list[Result[Any]]:
        self.asked.append(where)
        parts = function(*_moved(resolved(arguments)))
        assert len(parts) == count
        return [Done(_moved(part)) for part in parts]

    def describe(self) -> dict[str, Any]:
        return {"workers": 2}


def _moved(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
