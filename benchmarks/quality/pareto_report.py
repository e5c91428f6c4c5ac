"""The rows of pareto.py as a table and as a chart, with the verdict of every budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from pipeline.progress import result_console

PLAIN = ("rtn", "gptq")
OURS = "ours"
LABELS = {
    OURS: "ranks and bits searched (ours)",
    "rtn": "RTN, 8/6/5/4/3 bits",
    "gptq": "GPTQ, 8/6/5/4/3 bits",
}


def beaten_by(row: dict[str, Any], ours: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of ours that needs no more bytes than a rival and has no higher perplexity."""
    fits = [r for r in ours if r["stored_bytes"] <= row["stored_bytes"]]
    best = min(fits, key=lambda r: r["perplexity"], default=None)
    return best if best is not None and best["perplexity"] <= row["perplexity"] else None


def show_front(table: dict[str, Any]) -> None:
    """Every row on stdout, smallest first, with what of ours beats it."""
    ours = [row for row in table["rows"] if row.get("method") == OURS]
    view = Table(title=f"{table['settings']['model']}: perplexity against bytes")
    for heading in ("row", "MB", "of budget", "perplexity", "KL to dense", "beaten by"):
        view.add_column(heading, justify="left" if heading == "row" else "right")
    rows = [*table["rows"], *table.get("low_rank", [])]
    for row in sorted(rows, key=lambda row: row["stored_bytes"]):
        budget, kl = row.get("budget_bytes"), row.get("kl_to_dense")
        winner = None if row in ours or row["name"] == "dense" else beaten_by(row, ours)
        view.add_row(
            row["name"],
            f"{row['stored_bytes'] / 1e6:.1f}",
            f"{row['stored_bytes'] / budget:.1%}" if budget else "",
            f"{row['perplexity']:.2f}",
            "" if kl is None else f"{kl:.4f}",
            winner["name"] if winner else "",
        )
    result_console().print(view)


def save_front(table: dict[str, Any], path: Path) -> None:
    """Perplexity against bytes, one line for each method, as SVG."""
    figure = Figure(figsize=(8, 5), layout="tight")
    axes = figure.add_subplot()
    dense = next(row for row in table["rows"] if row["name"] == "dense")
    whole = dense["stored_bytes"]
    axes.axhline(dense["perplexity"], color="grey", linestyle=":", label="dense, float16")
    rows = [*table["rows"], *table.get("low_rank", [])]
    for method in dict.fromkeys(row["method"] for row in rows if "method" in row):
        points = sorted(
            (100 * row["stored_bytes"] / whole, row["perplexity"])
            for row in rows
            if row.get("method") == method
        )
        width = 2.5 if method == OURS else 1
        label = LABELS.get(method, f"{method}, float16")
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=width, label=label)
    axes.set_yscale("log")
    axes.set_ylim(dense["perplexity"] * 0.9, dense["perplexity"] * 30)
    axes.set_xlabel("bytes of all weights, % of float16")
    axes.set_ylabel("perplexity")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
