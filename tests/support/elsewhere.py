"""Workers that are this process: what they are given and return is pickled on the way."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from pipeline.workers.workers import InProcess, Value


class Elsewhere(InProcess):
    """Computes what is pickled and unpickled, as in another process.

    Attributes:
        asked: what the tasks were of.
    """

    at_once = 2

    def __init__(self) -> None:
        self.asked: list[str] = []

    def compute(self, where: str, function: Callable[..., Value], *given: Any) -> Value:
        self.asked.append(where)
        found: Value = _moved(function(*_moved(given)))
        return found

    def describe(self) -> dict[str, Any]:
        return {"workers": 2}


def _moved(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))
