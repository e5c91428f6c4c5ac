"""The ledger for people: a table at a terminal, and one HTML file that needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import IO

from rich.table import Table
from rich.text import Text

from pipeline.artefact import staged_folder, write_json, write_text
from pipeline.model.task import adapter_of
from pipeline.progress import result_console
from validate.ledger import Adapter, Column
from validate.record import Ledger, Row

_NOTHING = "-"
_WIDTH_WITHOUT_TERMINAL = 200
_STYLES = {"pass": "green", "fail": "bold red", "not run": "yellow", "measured": ""}


def print_ledger(ledger: Ledger, file: IO[str] | None = None) -> None:
    """Print the table, and below it why stages failed or did not run."""
    console = result_console(file, _WIDTH_WITHOUT_TERMINAL)
    console.print(build_table(ledger))
    if ledger.rounding is not None:
        console.print(_rounding_text(ledger))
    if answers := answers_text(ledger):
        console.print(answers, markup=False)
    for row in ledger.rows:
        for reason in row.verdict.reasons:
            style = _STYLES[row.verdict.status]
            status = row.verdict.status
            console.print(f"{status}: {row.name}: {reason}", style=style)


def build_table(ledger: Ledger) -> Table:
    """One line per stage."""
    table = Table(title="Same inputs through every stage", title_justify="left")
    table.add_column("stage")
    table.add_column("verdict")
    table.add_column("should equal")
    columns = _columns_of(ledger)
    for column in columns:
        table.add_column(column.title, justify="right")
    for row in ledger.rows:
        table.add_row(row.name, _verdict_cell(row), _reference_text(row), *_cells(row, columns))
    return table


def answers_text(ledger: Ledger) -> str:
    """The question, and what the original and the last stage said to it; empty without one."""
    answers = ledger.answers
    if not answers:
        return ""
    shown = [answers[0], *answers[1:][-1:]]
    width = max(len(name) for name, _ in shown)
    lines = [f"  {name:{width}}  {answer or '(nothing)'}" for name, answer in shown]
    return "\n".join([ledger.inputs["question"].replace("\n", " "), *lines])


def reported(
    run: Callable[[], Ledger],
    output: Path | None,
    *,
    overwrite: bool = False,
    inputs: Iterable[object] = (),
) -> Ledger:
    """Run a ledger and write its `ledger.json` and `ledger.html`.

    Args:
        run: does the work; not called where the reports could not be written.
        output: the folder to write, held from the beginning on; None writes nothing.
        overwrite: replace it if it is one that skipcat wrote.
        inputs: what is read; see `check_output`.

    Returns:
        The ledger.

    Raises:
        UsageError: `output` exists and may not be replaced, or another process is writing it.
    """
    if output is None:
        return run()
    with staged_folder(output, overwrite=overwrite, inputs=inputs) as staging:
        ledger = run()
        write_json(staging / "ledger.json", ledger.to_json())
        write_text(staging / "ledger.html", _render_html(ledger))
    return ledger


def _render_html(ledger: Ledger) -> str:
    """The page, with its plots inside."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from validate.report_plots import plot_ledger

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = _columns_of(ledger)
    return environment.get_template("ledger.html.jinja").render(
        ledger=ledger,
        columns=columns,
        cells=partial(_cells, columns=columns),
        reference_text=_reference_text,
        rounding=_rounding_text(ledger),
        has_reasons=any(row.verdict.reasons for row in ledger.rows),
        plots=plot_ledger(ledger),
    )


def _columns_of(ledger: Ledger) -> tuple[Column, ...]:
    """What every task has, with the task's own columns before the last."""
    task: Adapter = adapter_of(ledger.task, "ledger")
    equal = "Of the logits with those it should equal:"
    return (
        Column("cosine", f"{equal} worst {task.item} / mean.", _cosine),
        Column("error", "Of the logits against those it should equal: largest / mean.", _error),
        Column("KL orig.", f"KL(original || stage), nats {task.per_item}, mean.", _divergence),
        Column(task.agreement, task.top1, _top1),
        *task.columns,
        Column("s", "Seconds for loading and all measurements.", _seconds),
    )


def _cells(row: Row, columns: tuple[Column, ...]) -> list[str]:
    return [column.text(row) or _NOTHING for column in columns]


def _cosine(row: Row) -> str | None:
    if row.closeness is None:
        return None
    metrics = row.closeness.metrics
    return f"{metrics.min_cosine:.7f} / {metrics.mean_cosine:.7f}"


def _error(row: Row) -> str | None:
    if row.closeness is None:
        return None
    metrics = row.closeness.metrics
    return f"{metrics.max_error:.2e} / {metrics.mean_error:.2e}"


def _divergence(row: Row) -> str | None:
    return None if row.to_original is None else f"{row.to_original.metrics.kl_mean:.2e}"


def _top1(row: Row) -> str | None:
    return None if row.to_original is None else f"{row.to_original.metrics.top1_agreement:.1%}"


def _seconds(row: Row) -> str | None:
    return None if row.total_s is None else f"{row.total_s:.1f}"


def _reference_text(row: Row) -> str:
    """The stage it should equal."""
    return row.reference or _NOTHING


def _verdict_cell(row: Row) -> Text:
    """The status in its colour."""
    return Text(row.verdict.status, style=_STYLES[row.verdict.status])


def _rounding_text(ledger: Ledger) -> str:
    """What is quantised, and of the error of its outputs what rounding added; else empty."""
    found = ledger.rounding
    if found is None:
        return ""
    formats = ", ".join(f"{style} {count}" for style, count in found.formats.items())
    tables = ", ".join(f"{name} {style}" for name, style in found.tables.items())
    text = f"quantised: {found.groups} of {found.all_groups} groups"
    text += f" ({formats})" if formats else ""
    text += f"; {tables}" if tables else ""
    if found.truncated is None or found.rounded is None:
        return text
    share = "" if found.share is None else f"; of it, rounding {found.share:.0%}"
    return (
        f"{text}. Mean relative error of their outputs when they were fitted: "
        f"{found.truncated:.2e} before rounding, {found.rounded:.2e} after{share}"
    )
