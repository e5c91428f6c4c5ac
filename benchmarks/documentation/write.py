"""Write the figures of the documentation from the results, or find those that differ.

    python -m benchmarks.documentation.write             # make docs
    python -m benchmarks.documentation.write --check     # make docs ARGS=--check, in make lint
    python -m benchmarks.documentation.write --list

A figure stands between two marks, on lines of its own or inside one:

    <!-- figures: NAME -->
    | engine | tokens/s |
    <!-- end -->
    ... which is <!-- figures: NAME -->1.5<!-- end --> times as fast ...

NAME is one of FIGURES, which says what results it comes from.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.documentation.cache_figures import CACHE_FIGURES
from benchmarks.documentation.driving_figures import DRIVING_FIGURES
from benchmarks.documentation.family_figures import FAMILY_FIGURES
from benchmarks.documentation.gpu_figures import GPU_FIGURES
from benchmarks.documentation.kernel_figures import KERNEL_FIGURES
from benchmarks.documentation.quality_figures import QUALITY_FIGURES
from benchmarks.documentation.speed_figures import SPEED_FIGURES
from benchmarks.documentation.worker_figures import WORKER_FIGURES
from pipeline.errors import InputError

FIGURES = (
    CACHE_FIGURES
    | DRIVING_FIGURES
    | FAMILY_FIGURES
    | GPU_FIGURES
    | KERNEL_FIGURES
    | QUALITY_FIGURES
    | SPEED_FIGURES
    | WORKER_FIGURES
)
_ROOT = RESULTS.parents[1]
_START = re.compile(r"<!-- figures: (\S+) -->")
_END = "<!-- end -->"


def pages() -> list[Path]:
    """The files that may hold figures."""
    return [
        _ROOT / "README.md",
        *sorted((_ROOT / "docs").glob("*.md")),
        RESULTS.parent / "README.md",
    ]


def text_of(name: str) -> str:
    """A figure as Markdown, out of its results.

    Raises:
        InputError: no figure has this name.
    """
    if name not in FIGURES:
        raise InputError(
            "There is no such figure.", observed=name, expected=", ".join(sorted(FIGURES))
        )
    figure = FIGURES[name]
    found = [json.loads((RESULTS / f"{file}.json").read_text("utf-8")) for file in figure.results]
    return "\n".join(figure.lines(*found))


def rewritten(page: Path) -> tuple[str, list[str]]:
    """The text of a page with its figures as the results have them, and what differed.

    Returns:
        The text, and `file:line: figure: what stands there, and what should` for each difference.

    Raises:
        InputError: a mark without its end, or a name that no figure has.
    """
    text = page.read_text(encoding="utf-8")
    parts, differences, done = [], [], 0
    for start in _START.finditer(text):
        line = text.count("\n", 0, start.start()) + 1
        end = text.find(_END, start.end())
        if end < 0 or _START.search(text, start.end(), end):
            raise InputError(
                "A figure has no end.", where=f"{page}:{line}", observed=start[0], expected=_END
            )
        there, wanted = text[start.end() : end], text_of(start[1])
        if there.startswith("\n"):
            wanted = f"\n{wanted}\n"
        if there != wanted:
            differences.append(f"{page}:{_difference(there, wanted, line, start[1])}")
        parts += [text[done : start.end()], wanted]
        done = end
    return "".join([*parts, text[done:]]), differences


def _difference(there: str, wanted: str, line: int, name: str) -> str:
    """`line: figure: found against expected`, of the first line that differs."""
    old, new = there.split("\n"), wanted.split("\n")
    place = next(
        (k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b),
        min(len(old), len(new)),
    )
    found, expected = (lines[place] if place < len(lines) else "the end" for lines in (old, new))
    return f"{line + place}: {name}: {found!r}, should be {expected!r}"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 when a figure differs.")
@click.option("--list", "as_list", is_flag=True, help="Every figure and the results it is from.")
def command(check: bool, as_list: bool) -> None:
    """Write the figures of the documentation from the results."""
    if as_list:
        for name, figure in FIGURES.items():
            click.echo(f"{name}: {', '.join(f'{file}.json' for file in figure.results)}")
        return
    found = []
    for page in pages():
        text, differences = rewritten(page)
        found += [difference.replace(f"{_ROOT}/", "", 1) for difference in differences]
        if differences and not check:
            page.write_text(text, encoding="utf-8")
    click.echo("\n".join(found) or "all figures are as the results have them")
    if found and check:
        click.echo("make docs writes them", err=True)
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    sys.exit(run(command))
