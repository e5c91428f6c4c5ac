"""The ledger at a terminal."""

from __future__ import annotations

import sys
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from validate.record import Ledger, Row
from validate.report_columns import cells, columns_of, reference_text, rounding_text

WIDTH_WITHOUT_TERMINAL = 170
STYLES = {"pass": "green", "fail": "bold red", "not run": "yellow", "measured": ""}


def print_ledger(ledger: Ledger, file: IO[str] | None = None) -> None:
    """Print the table, and below it why stages failed or did not run."""
    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=file or sys.stdout, highlight=False, width=WIDTH_WITHOUT_TERMINAL)
    console.print(build_table(ledger))
    if ledger.rounding is not None:
        console.print(escape(rounding_text(ledger)))
    for row in ledger.rows:
        for reason in row.verdict.reasons:
            style = STYLES[row.verdict.status]
            status = row.verdict.status
            console.print(f"{status}: {escape(row.name)}: {escape(reason)}", style=style)


def build_table(ledger: Ledger) -> Table:
    """One line per stage."""
    table = Table(title="Same inputs through every stage", title_justify="left")
    table.add_column("stage")
    table.add_column("verdict")
    table.add_column("should equal")
    columns = columns_of(ledger)
    for column in columns:
        table.add_column(column.title, justify="right")
    for row in ledger.rows:
        table.add_row(
            escape(row.name), verdict_cell(row), reference_text(row), *cells(row, columns)
        )
    return table


def verdict_cell(row: Row) -> str:
    """The status in its colour."""
    style = STYLES[row.verdict.status]
    return f"[{style}]{row.verdict.status}[/]" if style else row.verdict.status
