"""The plots of the ledger's HTML page, each an SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.model.task import IMAGES
from validate.record import Ledger, Row

COLOURS = {"pass": "#2da44e", "fail": "#c62828", "measured": "#57789c", "not run": "#b0b8c0"}
SMALLEST_ON_LOG_AXIS = 1e-12


@dataclass(frozen=True)
class Plot:
    """A picture: its title, and its SVG in base64."""

    title: str
    svg: str


def plot_ledger(ledger: Ledger) -> list[Plot]:
    """Error, KL, perplexity or accuracy, and top-1 agreement, one bar per stage."""
    images = ledger.inputs.get("task") == IMAGES
    return [
        error_plot(ledger),
        divergence_plot(ledger),
        accuracy_plot(ledger) if images else perplexity_plot(ledger),
        top1_plot(ledger),
    ]


def largest_error(row: Row) -> float | None:
    """Largest absolute error to the reference stage."""
    return None if row.closeness is None else row.closeness.metrics.max_error


def mean_error(row: Row) -> float | None:
    """Mean absolute error to the reference stage."""
    return None if row.closeness is None else row.closeness.metrics.mean_error


def divergence(row: Row) -> float | None:
    """Mean KL to the original."""
    return None if row.to_original is None else row.to_original.metrics.kl_mean


def error_plot(ledger: Ledger) -> Plot:
    """Largest and mean logit error on a logarithmic axis, which starts below the smallest."""
    title = "Largest (bar) and mean (dot) logit error"
    figure, axes = new_axes(ledger, title)
    bars = [on_log_axis(largest_error(row)) for row in ledger.rows]
    dots = [on_log_axis(mean_error(row)) for row in ledger.rows]
    draw_bars(axes, ledger, bars)
    axes.plot(dots, range(len(dots)), "o", color="#1c2733", markersize=4)
    axes.set_xscale("log")
    shown = [value for value in bars + dots if not math.isnan(value)]
    if shown:
        axes.set_xlim(left=min(shown) / 10)
    return Plot(title, to_svg(figure))


def divergence_plot(ledger: Ledger) -> Plot:
    """KL to the original from zero: what compression cost, and that later stages add nothing."""
    unit = "an image" if ledger.inputs.get("task") == IMAGES else "per token"
    title = f"KL to the original, nats {unit}"
    figure, axes = new_axes(ledger, title)
    draw_bars(axes, ledger, [drawable(divergence(row)) for row in ledger.rows])
    axes.set_xlim(left=0)
    return Plot(title, to_svg(figure))


def perplexity_plot(ledger: Ledger) -> Plot:
    """Perplexities with error bars of one standard error."""
    title = "Perplexity, with one standard error"
    figure, axes = new_axes(ledger, title)
    measured = [row.perplexity for row in ledger.rows]
    draw_bars(axes, ledger, [drawable(entry.value if entry else None) for entry in measured])
    for place, entry in enumerate(measured):
        if entry and entry.standard_error is not None and math.isfinite(entry.value):
            axes.errorbar(entry.value, place, xerr=entry.standard_error, color="#1c2733", capsize=3)
    return Plot(title, to_svg(figure))


def accuracy_plot(ledger: Ledger) -> Plot:
    """Accuracies with error bars of one standard error."""
    title = "Accuracy, %, with one standard error"
    figure, axes = new_axes(ledger, title)
    measured = [row.accuracy for row in ledger.rows]
    draw_bars(axes, ledger, [100 * entry.value if entry else math.nan for entry in measured])
    for place, entry in enumerate(measured):
        if entry:
            error = 100 * entry.standard_error
            axes.errorbar(100 * entry.value, place, xerr=error, color="#1c2733", capsize=3)
    axes.set_xlim(0, 100)
    return Plot(title, to_svg(figure))


def top1_plot(ledger: Ledger) -> Plot:
    """Top-1 agreement with the original, per cent."""
    title = "Top-1 agreement with the original, %"
    figure, axes = new_axes(ledger, title)
    metrics = [row.to_original.metrics if row.to_original else None for row in ledger.rows]
    draw_bars(axes, ledger, [100 * entry.top1_agreement if entry else 0.0 for entry in metrics])
    axes.set_xlim(0, 100)
    return Plot(title, to_svg(figure))


def new_axes(ledger: Ledger, title: str) -> tuple[Figure, Axes]:
    """An empty figure with a line for every stage, the first one on top."""
    figure = Figure(figsize=(6.4, 1.2 + 0.36 * len(ledger.rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_yticks(range(len(ledger.rows)), [row.name for row in ledger.rows], fontsize=9)
    axes.set_ylim(len(ledger.rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_bars(axes: Axes, ledger: Ledger, values: Sequence[float]) -> None:
    """One bar per stage in the colour of its verdict; NaN leaves the line empty."""
    colours = [COLOURS[row.verdict.status] for row in ledger.rows]
    axes.barh(range(len(values)), values, color=colours, height=0.6)
    for place, row in enumerate(ledger.rows):
        if row.verdict.status == "not run":
            axes.text(
                0.01,
                place,
                "not run",
                va="center",
                fontsize=9,
                color="#6a737d",
                transform=axes.get_yaxis_transform(),
            )


def on_log_axis(value: float | None) -> float:
    """A value fit for a logarithmic axis: exact zeros at its far left end."""
    value = drawable(value)
    return value if math.isnan(value) else max(value, SMALLEST_ON_LOG_AXIS)


def drawable(value: float | None) -> float:
    """NaN, which matplotlib leaves out, for everything that cannot be drawn."""
    return value if value is not None and math.isfinite(value) else math.nan


def to_svg(figure: Figure) -> str:
    """The figure as base64 of an SVG that is the same for the same data."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "skipcat", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
