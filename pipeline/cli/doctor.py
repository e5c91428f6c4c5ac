"""`skipcat doctor`: what this machine can do, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from pipeline.cli import options

if TYPE_CHECKING:
    from pipeline.doctor import Machine


@click.command("doctor")
@options.json_output
def command(as_json: bool) -> None:
    """Say which stages of the pipeline work on this machine, and why."""
    from pipeline import doctor

    machine = doctor.examine()
    if as_json:
        click.echo(json.dumps(machine.to_json(), indent=2))
    else:
        _print_report(machine)


def _print_report(found: Machine) -> None:
    """Print the facts and the verdicts as two tables on stdout."""
    from rich.table import Table

    from pipeline.progress import result_console

    machine = Table("", "Found", "Reason", title="This machine", title_justify="left")
    for row in found.facts():
        machine.add_row(*row)
    pipeline = Table("Stage", "", "Why", title="The pipeline", title_justify="left")
    for verdict in found.stages():
        pipeline.add_row(verdict.stage, "yes" if verdict.works else "no", verdict.why)
    for table in (machine, pipeline):
        result_console().print(table)
