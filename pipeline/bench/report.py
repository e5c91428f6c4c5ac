"""The tables of a measurement and of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def measured_table(record: dict[str, Any]) -> Table:
    """One row a model; tokens/s as median and extremes over the rounds."""
    settings, bandwidth = record["settings"], record["bandwidth"]
    read = bandwidth["bytes_per_s"]
    table = Table(
        title=f"measured on {where(record)}: {settings['prompt_tokens']} tokens read at once, "
        f"then {settings['new_tokens']} one by one from {settings['context']} on; memory "
        f"{giga(read['median'])} GB/s ({giga(read['min'])} to {giga(read['max'])}), "
        f"{bandwidth['method']}",
        title_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("session")
    for heading in (
        "prefill\ntokens/s", "decode\ntokens/s", "lowest to\nhighest", "ms a\ntoken",
        "MB read\na token", "GB/s", "of the\nmemory's", "peak\nMB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in record["rows"]:
        table.add_row(*measured_cells(row))
    return table


def measured_cells(row: dict[str, Any]) -> Sequence[str]:
    """The cells of one model."""
    decode = row["decode_tokens_per_s"]
    peak = mega(row["peak_bytes"])
    if row["peak_device_bytes"]:
        peak += f"\n+ {mega(row['peak_device_bytes'])} GPU"
    return (
        row["model"],
        row["session"],
        f"{row['prefill_tokens_per_s']['median']:,.0f}",
        f"{decode['median']:,.1f}",
        f"{decode['min']:,.1f} to {decode['max']:,.1f}",
        f"{row['token_ms']:.2f}",
        f"{row['bytes_per_token'] / 1e6:,.1f}",
        giga(row["bytes_per_s"]),
        f"{row['bandwidth_share']:.0%}",
        peak,
    )


def where(record: dict[str, Any]) -> str:
    """The device of a measurement, by name."""
    machine, settings = record["machine"], record["settings"]
    if settings["device"] == "cuda" and isinstance(machine["gpus"], list):
        return str(machine["gpus"][0]["name"])
    return f"{machine['cpu']}, {settings['threads']} threads"


def predicted_table(record: dict[str, Any]) -> Table:
    """One row for a model on a device."""
    table = Table(
        title=f"PREDICTED, not measured: one sequence, {record['context']} tokens in the cache",
        title_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("device")
    for heading in (
        "GB/s", "MB read\na token", "bound\ntokens/s", "expected\ntokens/s", "of the\nbound",
        "memory\nGB", "published\nfigures",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in record["rows"]:
        needed = f"{giga(row['needed_bytes'])}" + ("" if row["fits"] else "\ndoes not fit")
        table.add_row(
            row["model"],
            row["device"],
            f"{row['gb_per_s']:.0f}",
            f"{row['bytes_per_token'] / 1e6:,.1f}",
            f"{row['bound_tokens_per_s']:,.1f}",
            f"{row['expected_tokens_per_s']:,.1f}",
            f"{row['efficiency']:.0%}",
            needed,
            row["published_figures"],
        )
    return table


def check_line(check: dict[str, Any]) -> str:
    """How far the prediction is from what was published."""
    fitted = sum(row["fitted"] for row in check["published"])
    others = len(check["published"]) - fitted
    return (
        f"expected: {check['efficiency']:.0%} of the bandwidth, and "
        f"{check['cycles_per_kernel']:,.0f} cycles for every kernel; fitted to {fitted} "
        f"published figures of TensorRT Edge-LLM, from which it is at most "
        f"{check['worst_error_of_fitted']:.0%} off (a device it has not seen: "
        f"{check['worst_error_without_device']:.0%}; {others} figures of MLC: "
        f"{check['worst_error_of_others']:.0%})"
    )


def checked_against(check: dict[str, Any], device: str) -> str:
    """How many figures of a device were published, and the largest error of them."""
    errors = [abs(row["error"]) for row in check["published"] if row["device"] == device]
    return f"{len(errors)}, at most {max(errors):.0%} off" if errors else "none"


def giga(value: float) -> str:
    """In units of 10^9."""
    return f"{value / 1e9:.1f}"


def mega(value: float) -> str:
    """In units of 10^6."""
    return f"{value / 1e6:,.0f}"
