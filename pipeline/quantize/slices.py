"""Parts of a range: of the widest matrices every copy is gigabytes."""

from __future__ import annotations

from collections.abc import Iterator


def slices(count: int, at_once: int) -> Iterator[slice]:
    """Slices that cover so many places in order, the last one perhaps shorter."""
    for start in range(0, count, at_once):
        yield slice(start, min(start + at_once, count))
