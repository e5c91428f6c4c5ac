"""The ledger as one HTML file that needs no other file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from validate.record import Ledger
from validate.report_columns import cells, columns_of, reference_text, rounding_text
from validate.report_plots import plot_ledger

TEMPLATES = Path(__file__).parent


def render_html(ledger: Ledger) -> str:
    """The page, with its plots inside."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("ledger.html.jinja").render(
        ledger=ledger,
        columns=columns_of(ledger),
        cells=partial(cells, columns=columns_of(ledger)),
        reference_text=reference_text,
        rounding=rounding_text(ledger),
        has_reasons=any(row.verdict.reasons for row in ledger.rows),
        plots=plot_ledger(ledger),
    )
