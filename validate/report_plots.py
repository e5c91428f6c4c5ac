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

from pipeline.model.task import adapter_of
from validate.ledger import Adapter, Drawn
from validate.record import Ledger

_COLOURS = {"pass": "#2da44e", "fail": "#c62828", "measured": "#57789c", "not run": "#b0b8c0"}
_SMALLEST_ON_LOG_AXIS = 1e-12


@dataclass(frozen=True)
class _Plot:
    """A picture: its title, and its SVG in base64."""

    title: str
    svg: str


def plot_ledger(ledger: Ledger) -> list[_Plot]:
    """Error, KL, the task's own measure, and top-1 agreement, one bar per stage."""
    task: Adapter = adapter_of(ledger.task, "ledger")
    return [
        _error_plot(ledger),
        _divergence_plot(ledger, task.per_item),
        _measure_plot(ledger, task.drawn),
        _top1_plot(ledger, task.agreement),
    ]


def _error_plot(ledger: Ledger) -> _Plot:
    """Largest and mean logit error on a logarithmic axis, which starts below the smallest."""
    title = "Largest (bar) and mean (dot) logit error"
    figure, axes = _new_axes(ledger, title)
    metrics = [row.closeness.metrics if row.closeness else None for row in ledger.rows]
    bars = [_on_log_axis(entry.max_error if entry else None) for entry in metrics]
    dots = [_on_log_axis(entry.mean_error if entry else None) for entry in metrics]
    _draw_bars(axes, ledger, bars)
    axes.plot(dots, range(len(dots)), "o", color="#1c2733", markersize=4)
    axes.set_xscale("log")
    shown = [value for value in bars + dots if not math.isnan(value)]
    if shown:
        axes.set_xlim(left=min(shown) / 10)
    return _Plot(title, _to_svg(figure))


def _divergence_plot(ledger: Ledger, per_item: str) -> _Plot:
    """KL to the original from zero: what compression cost, and that later stages add nothing."""
    title = f"KL to the original, nats {per_item}"
    figure, axes = _new_axes(ledger, title)
    metrics = [row.to_original.metrics if row.to_original else None for row in ledger.rows]
    _draw_bars(axes, ledger, [_drawable(entry.kl_mean if entry else None) for entry in metrics])
    axes.set_xlim(left=0)
    return _Plot(title, _to_svg(figure))


def _measure_plot(ledger: Ledger, drawn: Drawn) -> _Plot:
    """The measure of a task with error bars of one standard error."""
    figure, axes = _new_axes(ledger, drawn.title)
    measured = [drawn.value(row) for row in ledger.rows]
    _draw_bars(axes, ledger, [_drawable(entry[0] if entry else None) for entry in measured])
    for place, entry in enumerate(measured):
        if entry and entry[1] is not None and math.isfinite(entry[0]):
            axes.errorbar(entry[0], place, xerr=entry[1], color="#1c2733", capsize=3)
    if drawn.limits is not None:
        axes.set_xlim(drawn.limits)
    return _Plot(drawn.title, _to_svg(figure))


def _top1_plot(ledger: Ledger, agreement: str) -> _Plot:
    """Top-1 agreement with the original, per cent."""
    title = f"{agreement.capitalize()} agreement with the original, %"
    figure, axes = _new_axes(ledger, title)
    metrics = [row.to_original.metrics if row.to_original else None for row in ledger.rows]
    _draw_bars(axes, ledger, [100 * entry.top1_agreement if entry else 0.0 for entry in metrics])
    axes.set_xlim(0, 100)
    return _Plot(title, _to_svg(figure))


def _new_axes(ledger: Ledger, title: str) -> tuple[Figure, Axes]:
    """An empty figure with a line for every stage, the first one on top."""
    figure = Figure(figsize=(6.4, 1.2 + 0.36 * len(ledger.rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_yticks(range(len(ledger.rows)), [row.name for row in ledger.rows], fontsize=9)
    axes.set_ylim(len(ledger.rows) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_bars(axes: Axes, ledger: Ledger, values: Sequence[float]) -> None:
    """One bar per stage in the colour of its verdict; NaN leaves the line empty."""
    colours = [_COLOURS[row.verdict.status] for row in ledger.rows]
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


def _on_log_axis(value: float | None) -> float:
    """A value fit for a logarithmic axis: exact zeros at its far left end."""
    value = _drawable(value)
    return value if math.isnan(value) else max(value, _SMALLEST_ON_LOG_AXIS)


def _drawable(value: float | None) -> float:
    """NaN, which matplotlib leaves out, for everything that cannot be drawn."""
    return value if value is not None and math.isfinite(value) else math.nan


def _to_svg(figure: Figure) -> str:
    """The figure as base64 of an SVG that is the same for the same data."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "skipcat", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")
