"""The rows of cache.py as a table, and as two charts: all forms, and those that rebuild nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from pipeline.progress import result_console

# Below this a KL is drawn as if it were this.
_LEAST_KL = 1e-5
_OURS = "ours"


def show_rows(record: dict[str, Any]) -> None:
    """Every row on stdout, fewest bits first."""
    dense = record["dense"]["perplexity"]
    view = Table(title=f"{record['model']}, {record['test']}: dense {dense:.3f}")
    for heading in ("cache", "rebuilt", "bits", "perplexity", "of dense", "KL"):
        view.add_column(heading, justify="left" if heading == "cache" else "right")
    for row in sorted(record["rows"], key=lambda row: row["bits"]):
        view.add_row(
            row["cache"],
            "yes" if row["rebuilds"] else "",
            f"{row['bits']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['perplexity'] / dense:.4f}",
            f"{row['kl']:.4f}",
        )
    result_console().print(view)


def save_fronts(record: dict[str, Any], result: Path) -> None:
    """KL against bits, beside the JSON: all rows, and those of which nothing is rebuilt."""
    at_once = [row for row in record["rows"] if not row["rebuilds"]]
    for name, title, rows in (
        ("", "all forms", record["rows"]),
        ("_at_once", "nothing is rebuilt", at_once),
    ):
        if rows:
            _draw(rows, f"{record['model']}, {title}", result.with_name(f"{result.stem}{name}.svg"))


def _draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="tight")
    axes = figure.add_subplot()
    for family in dict.fromkeys(row["family"] for row in rows):
        points = sorted(
            (row["bits"], max(row["kl"], _LEAST_KL)) for row in rows if row["family"] == family
        )
        width = 2.5 if family.startswith(_OURS) else 1
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=width, label=family)
    axes.set_yscale("log")
    axes.set_xlabel("bits of a cached number, scales and offsets included")
    axes.set_ylabel("KL to the dense cache, nats a token")
    axes.set_title(title)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
