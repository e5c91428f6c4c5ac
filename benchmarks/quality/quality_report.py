"""The rows of quality.py as a table and as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from pipeline.compress.methods import DEFAULT_EFFORT
from pipeline.progress import result_console

DENSE = "dense"


def show(table: dict[str, Any]) -> None:
    """The table on stdout."""
    settings = table["settings"]
    view = Table(
        title=f"{settings['model']}; {settings['test']}, {settings['test_windows']} x "
        f"{settings['test_window_length']} tokens; calibrated on {settings['calibration']}"
    )
    headings = ("kept", "perplexity", "x dense", "KL to dense", "top-1", "ARC-style", "s", "|A'|")
    view.add_column("method")
    for heading in headings:
        view.add_column(heading, justify="right")
    for row in sorted(table["rows"], key=lambda row: (-row["keep"], row["kl_to_dense"])):
        view.add_row(*cells(row))
    result_console().print(view)


def save_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against the kept fraction, one line for each method, as SVG."""
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.add_subplot()
    dense = next(row for row in rows if row["method"] == DENSE)
    axes.axhline(dense["perplexity"], color="grey", linestyle=":", label=DENSE)
    names = dict.fromkeys((r["method"], r["effort"]) for r in rows if r["method"] != DENSE)
    for method, effort in names:
        points = sorted(
            (r["kept_fraction"], r["perplexity"])
            for r in rows
            if (r["method"], r["effort"]) == (method, effort)
        )
        label = method if effort == DEFAULT_EFFORT else f"{method}, {effort}"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("decoder-linear parameters kept")
    axes.set_ylabel("perplexity")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text."""
    seconds, largest = row["compress_seconds"], row["largest_interpolation"]
    error = row["perplexity_standard_error"]
    return [
        row["method"] + ("" if row["effort"] in (None, DEFAULT_EFFORT) else f", {row['effort']}"),
        f"{row['kept_fraction']:.1%}",
        f"{row['perplexity']:.2f}" + ("" if error is None else f" ± {error:.2f}"),
        f"{np.exp(row['log_perplexity_change']):.3f}",
        f"{row['kl_to_dense']:.3f}",
        f"{row['top1_to_dense']:.1%}",
        "-" if row["questions"] is None else f"{row['questions']['acc'][0]:.1%}",
        "-" if seconds is None else f"{seconds:.0f}",
        "-" if largest is None else f"{largest:.3f}",
    ]
