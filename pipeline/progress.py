"""Progress on stderr: a bar on a terminal, a line now and then elsewhere; results on stdout."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pipeline.terminal import unguarded, visible

# rich is imported where it is used: answering a prompt needs none of it, and it takes 5 MB.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_Item = TypeVar("_Item")
_SECONDS_BETWEEN_LINES = 20.0
_MINUTE = 60
_hidden = False


@functools.cache
def _console_class() -> type[Console]:
    """A console to which a string is a text of somebody else: no markup, no control characters."""
    from rich.console import Console

    class PlainConsole(Console):
        def render_str(self, text: str, **settings: Any) -> Text:
            settings["markup"] = settings["emoji"] = False
            return super().render_str(visible(text) if self.is_terminal else text, **settings)

    return PlainConsole


def _console() -> Console:
    """Where progress, notes and warnings go."""
    return _console_class()(file=unguarded(sys.stderr), highlight=False, soft_wrap=True)


def result_console(file: IO[str] | None = None, width: int = 120) -> Console:
    """Where tables go. What is a string in one is shown as it is; rich's `Text` may have styles.

    Args:
        file: None is stdout.
        width: in columns, where there is no terminal to ask.
    """
    target = unguarded(sys.stdout) if file is None else file
    console = _console_class()(file=target, highlight=False)
    return (
        console
        if console.is_terminal
        else _console_class()(file=target, highlight=False, width=width)
    )


def hide_progress(hidden: bool) -> None:
    """Whether bars, spinners and lines of how far work has come are left out; notes stay."""
    global _hidden
    _hidden = hidden


def waiting(message: str) -> AbstractContextManager[Any]:
    """A spinner on stderr, where that is a terminal."""
    if _hidden:
        return nullcontext()
    from rich.text import Text

    return _console().status(Text(visible(message)))


def note(message: str) -> None:
    """Tell the user one thing, on stderr."""
    _console().print(message)


def track(items: Iterable[_Item], description: str, total: int | None = None) -> Iterator[_Item]:
    """Yield the items and show how many are done, with the time that remains."""
    if _hidden:
        yield from items
        return
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

    shown = TextColumn("{task.description}", markup=False)
    columns = (shown, BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=target, transient=True) as progress:
        task = progress.add_task(visible(description), total=total)
        for item in items:
            yield item
            progress.advance(task)


def _track_by_lines(items: Iterable[_Item], description: str, total: int | None) -> Iterator[_Item]:
    started = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last > _SECONDS_BETWEEN_LINES:
            left = _time_left(now - started, done, total)
            note(f"{description}: {done} of {total if total is not None else '?'}{left}")
            last = now
        yield item


def _time_left(seconds: float, done: int, total: int | None) -> str:
    """`, about 3 min left`, if the rest goes as what is done did; empty where that is unknown."""
    if not done or total is None:
        return ""
    left = seconds / done * (total - done)
    return f", about {left / _MINUTE:.0f} min left" if left >= _MINUTE else ", under a minute left"
