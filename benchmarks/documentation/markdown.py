"""What a figure of the documentation is, and numbers and tables as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One table, or one number in the prose.

    Attributes:
        results: names of the files that it comes from, without `.json`.
        lines: (their contents) -> lines of Markdown; one line may stand inside a sentence.
    """

    results: tuple[str, ...]
    lines: Callable[..., list[str]]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A table whose first `left` columns are words and whose others are numbers."""
    rule = ["---" if place < left else "---:" for place in range(len(headings))]
    return [_line(headings), "| " + " | ".join(rule) + " |", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def bold(text: str, really: bool = True) -> str:
    """**text**."""
    return f"**{text}**" if really else text


def percent(fraction: float, digits: int = 1) -> str:
    """`79.6%`; all of it is `100%`."""
    return "100%" if fraction == 1 else f"{fraction:.{digits}%}"


def megabytes(count: float, digits: int = 0) -> str:
    """Bytes in millions, with commas."""
    return f"{count / 1e6:,.{digits}f}"


def only_row(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row that has these values.

    Raises:
        LookupError: there is none, or there are several.
    """
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows have {wanted}")
    return found[0]
