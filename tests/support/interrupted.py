"""Functions that are interrupted, as by Ctrl-C, after so many calls."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["broken_at"]


def broken_at(count: int, function: Callable) -> Callable:
    """A function that is interrupted in its call after so many."""
    calls = iter(range(count + 1))

    def call(*arguments: object) -> object:
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments)

    return call
