"""Text on its way to a person: what others wrote is shown, and never obeyed by the terminal.

Control characters in names, records, messages and answers can rename the window, hide what was
said, or type for the user. At a terminal they are made visible; a pipe gets what there is.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

_STATUS_OF_SIGPIPE = 141  # 128 and the signal, as a shell says it of other programs
# C0, DEL and C1 but for the two that lay text out.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"
}


def visible(text: str) -> str:
    r"""A text with its control characters written out, as `\x1b`; newlines and tabs stay."""
    return text.translate(_CONTROLS)


class _Guarded:
    """A text stream to a terminal through which no control character comes.

    Attributes:
        unguarded: the stream itself, for those who draw.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        self.unguarded.write(visible(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


def guarded(stream: TextIO) -> TextIO:
    """The stream for text of others: itself, or a guard of it where it is a terminal."""
    if stream is None or isinstance(stream, _Guarded) or not stream.isatty():
        return stream
    return cast(TextIO, _Guarded(stream))


def unguarded(stream: TextIO) -> TextIO:
    """What stands behind a guard, for a program that draws and has looked at what it draws."""
    return stream.unguarded if isinstance(stream, _Guarded) else stream


@contextlib.contextmanager
def safe_stdout() -> Iterator[None]:
    """Guard stdout for the block, and show what its encoding has not as a question mark."""
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    if stream is not None:
        sys.stdout = guarded(stream)
    try:
        yield
    finally:
        sys.stdout = stream


def drop_stdout() -> int:
    """Whoever read stdout is gone: nothing more goes there; the exit status that says so."""
    # What is still buffered would fail again when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _STATUS_OF_SIGPIPE


def aside(text: str = "", end: str = "\n") -> None:
    """Say something on stderr, at once; results are for stdout."""
    if sys.stderr is not None:
        print(text, end=end, file=guarded(sys.stderr), flush=True)
