"""Predictions of speed, memory and energy on devices, against figures that nothing was fitted to.

    python -m benchmarks.quality.predictions

Every figure is a published one: `pipeline/bench/published.py` says of whom, and which of them the
constants were fitted to. Nothing is run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.judge import judged_figures, verdicts
from pipeline.progress import result_console
from pipeline.provenance import provenance


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "predictions.json",
    help="File for the figures.",
)
def command(output: Path) -> None:
    """Hold predictions against published figures."""
    checked = judged_figures()
    found = verdicts(checked["published"])
    result_console().print(_table(found))
    record = {"schema": 1, "verdicts": found, "provenance": provenance()} | checked
    write_json(output, record)


def _table(found: list[dict[str, Any]]) -> Table:
    """One row a group of figures."""
    table = Table(title="Errors on published figures that nothing was fitted to")
    for heading in ("figures", "how many", "median", "worst", "asked", "in the interval of 80%"):
        table.add_column(heading, justify="left" if heading == "figures" else "right")
    for one in found:
        asked = one["asked"]
        table.add_row(
            one["group"],
            str(one["figures"]),
            f"{one['median_error']:.0%}",
            f"{one['worst_error']:.0%}",
            "" if asked is None else f"{asked:.0%}" + ("" if one["met"] else ", missed"),
            f"{one['inside_share']:.0%}",
        )
    return table


if __name__ == "__main__":
    sys.exit(run(command))
