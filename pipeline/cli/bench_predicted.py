"""`skipcat bench --predict`: what is expected of devices that are not here: a table and notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.bench.devices import DeviceSpec
    from pipeline.bench.targets import BenchTarget

_Row = dict[str, Any]
_RIGHT = ("tokens/s\nbound", "tokens/s\nexpected", "prompt\nms", "joules\na token", "memory\nGB")


def predicted_record(
    targets: list[BenchTarget], devices: list[DeviceSpec], context: int
) -> dict[str, Any]:
    """Predict, and print the table."""
    from pipeline.bench.predict import predict
    from pipeline.progress import note, result_console

    record = predict(targets, devices, context)
    result_console().print(_predicted_table(record))
    for line in (*_check_lines(record["check"]), *_build_lines(record["rows"])):
        note(line)
    for line in _rebuilding_lines(record["rows"]):
        note(line)
    return record


def _predicted_table(record: dict[str, Any]) -> Table:
    """One row for a model on a device in an engine."""
    from rich.table import Table

    table = Table(
        title=f"PREDICTED, not measured: one sequence, {record['context']} tokens in the cache; "
        "80% of outcomes are meant to lie from lowest to highest",
        title_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("device", overflow="fold")
    table.add_column("engine", no_wrap=True)
    for heading in _RIGHT:
        table.add_column(heading, justify="right", no_wrap=True)
    before = ("", "")
    for row in record["rows"]:
        place = (row["model"], row["device"])
        shown = ("", "") if place == before else place
        table.add_row(*shown, *_cells(row))
        before = place
    return table


def _cells(row: _Row) -> Iterator[str]:
    """The cells of one row, but model and device."""
    kind, prompt, joules = row["counted_as"], row["prefill_ms"], row["joules_per_token"]
    yield row["engine"] + (f"\n{kind}" if kind and kind != row.get("dtype") else "")
    yield f"{row['bound_tokens_per_s']:,.1f}"
    yield f"{row['expected_tokens_per_s']:,.1f}\n{_ends(row['tokens_per_s'], 1, 1)}"
    yield f"> {row['least_prefill_ms']:,.0f}" if prompt is None else _ends(prompt, 1, 0)
    yield "unknown" if joules is None else _ends(joules, 1, 2)
    yield f"{_ends(row['run_bytes'], 1e9, 1)}\n{row['verdict']}"


def _ends(estimate: dict[str, float], unit: float, digits: int) -> str:
    """The interval of an estimate."""
    low, high = (f"{estimate[end] / unit:,.{digits}f}" for end in ("low", "high"))
    return low if low == high else f"{low} to {high}"


def _check_lines(check: dict[str, Any]) -> Iterator[str]:
    """What the constants are, and how far predictions are from figures they were not fitted to."""
    from pipeline.bench.judge import verdicts

    constants = "; ".join(
        f"{engine} {fit['efficiency']:.0%} of the bandwidth, {fit['cycles_per_kernel']:,.0f} "
        "cycles a kernel"
        for engine, fit in check["fits"].items()
    )
    yield f"expected: {constants}; ours, never measured on such a device, between the two"
    found = (
        f"{one['group']} {one['worst_error']:.0%} of {one['figures']}"
        for one in verdicts(check["published"])
    )
    yield "largest error on published figures that nothing was fitted to: " + ", ".join(found)


def _build_lines(rows: list[_Row]) -> Iterator[str]:
    """What building our engine takes, and the swap that helps where that is more than there is."""
    from pipeline.bench.predict import DOES_NOT_FIT, OURS
    from pipeline.memory import swap_advice

    for row in rows:
        peak, available = row["build_peak_bytes"], row["available_bytes"]
        if row["engine"] != OURS or row["verdict"] == DOES_NOT_FIT:
            continue
        needed = (
            f"{row['model']} on {row['device']}: building ours takes {_ends(peak, 1e9, 1)} GB and "
            f"more than {row['least_build_seconds']:,.0f} s (as on a PC, in float16)"
        )
        short = peak["expected"] > available
        advice = swap_advice(int(peak["expected"]), available) if short else ""
        yield f"{needed}, {available / 1e9:.1f} GB are free: {advice}" if short else needed


def _rebuilding_lines(rows: list[_Row]) -> list[str]:
    """What keys that are rebuilt at every step cost, and where that does not pay."""
    from pipeline.bench.predict import OURS

    return [
        f"{row['model']} on {row['device']}: rebuilding keys takes {row['rebuild_flop'] / 1e9:.2f} "
        f"GFLOP a token, {row['rebuild_flop_per_byte']:,.0f} for each byte that it saves; "
        f"the device has {row['flop_per_byte']:,.0f} at its peak, so "
        + (
            "it pays"
            if row["rebuilding_pays"]
            else "keys as they are would be faster: --cache-form narrow or stock rebuilds none"
        )
        for row in rows
        if row["rebuild_flop"] and row["engine"] == OURS
    ]
