"""Progress on stderr: a bar on a terminal, a line now and then elsewhere; results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

# rich is imported where it is used: answering a prompt needs none of it, and it takes 5 MB.
if TYPE_CHECKING:
    from rich.console import Console

_Item = TypeVar("_Item")
_SECONDS_BETWEEN_LINES = 20.0


def _console() -> Console:
    """Where progress, notes and warnings go."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def result_console() -> Console:
    """Where tables go: stdout, as wide as the terminal or 120 columns where there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def note(message: str) -> None:
    """Tell the user one thing, on stderr."""
    _console().print(message, markup=False)


def track(items: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
    """Yield the items and show how many are done, with the time that remains."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    target = _console()
    if not target.is_terminal:
        yield from _track_by_lines(items, description, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=target, transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in items:
            yield item
            progress.advance(task)


def _track_by_lines(items: Iterable[_Item], description: str, total: int | None) -> Iterator[_Item]:
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            note(f"{description}: {done} of {total if total is not None else '?'}")
            last = time.monotonic()
        yield item
