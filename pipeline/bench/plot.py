"""The roofline of decoding: tokens/s against bytes a token, under the line of the bandwidth."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.artefact import write_text

_INK = "#1c2733"
_COLOURS = ("#57789c", "#2da44e", "#c62828", "#8a63d2", "#bf8700", "#1b7c83")
_MARKERS = "osD^vPX<>*"
_MARGIN = 1.6


@dataclass(frozen=True)
class _Point:
    """One model under one line.

    Attributes:
        label: of the model.
        line: number of the line it belongs to.
        read_bytes: for a token.
        tokens_per_s: median, or what is expected.
        low: lowest of the rounds, or low end of what is expected.
        high: highest likewise.
    """

    label: str
    line: int
    read_bytes: float
    tokens_per_s: float
    low: float
    high: float


def write_plot(record: dict[str, Any], path: Path) -> None:
    """The SVG of a measurement or a prediction, as the record says of itself."""
    draw = _draw_measured if record["kind"] == "measurement" else _draw_predicted
    write_text(path, draw(record))


def _draw_measured(record: dict[str, Any]) -> str:
    """The SVG of a measurement: a line for the bandwidth, and a dot for each model."""
    points = []
    for row in record["rows"]:
        rate = row["decode_tokens_per_s"]
        label = f"{row['model']}, {row['session']}"
        place = row["bytes_per_token"], rate["median"], rate["min"], rate["max"]
        points.append(_Point(label, 0, *place))
    bandwidth = record["bandwidth"]["bytes_per_s"]["median"]
    lines = [(f"memory, {bandwidth / 1e9:.1f} GB/s", bandwidth)]
    return _draw("decode, measured", lines, points, measured=True)


def _draw_predicted(record: dict[str, Any]) -> str:
    """The SVG of a prediction: a line for each device, and circles for what is expected."""
    speeds = {row["device"]: row["gb_per_s"] * 1e9 for row in record["rows"]}
    lines = [(f"{name}, {speed / 1e9:.0f} GB/s", speed) for name, speed in speeds.items()]
    order = list(speeds)
    points = []
    for row in record["rows"]:
        rate = row["expected_tokens_per_s"]
        line = order.index(row["device"])
        ends = row["tokens_per_s"]
        label = f"{row['model']}, {row['engine']}"
        place = row["bytes_per_token"], rate, ends["low"], ends["high"]
        points.append(_Point(label, line, *place))
    return _draw("decode, PREDICTED, not measured", lines, points, measured=False)


def _draw(
    title: str, lines: Sequence[tuple[str, float]], points: Sequence[_Point], *, measured: bool
) -> str:
    """The SVG, the same for the same data.

    Args:
        title: above it.
        lines: name and bytes a second.
        points: at least one.
        measured: solid, each model in a colour; otherwise hollow, in the colour of the line.
    """
    labels = list(dict.fromkeys(point.label for point in points))
    height = 3.6 + 0.2 * (len(lines) + len(labels))
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="MB read for a token", ylabel="tokens/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(FuncFormatter(_plain))
    axes.tick_params(which="both", labelsize=7)
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    sizes = [point.read_bytes for point in points]
    ends = [min(sizes) / _MARGIN, max(sizes) * _MARGIN]
    for number, (name, speed) in enumerate(lines):
        colour = _INK if measured else _COLOURS[number % len(_COLOURS)]
        rates = [speed / end for end in ends]
        axes.plot([end / 1e6 for end in ends], rates, color=colour, linewidth=1.2, label=name)
    for point in points:
        _draw_point(axes, point, labels.index(point.label), measured=measured)
    figure.legend(fontsize=8, frameon=False, loc="outside lower left")
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "skipcat", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_point(axes: Axes, point: _Point, number: int, *, measured: bool) -> None:
    """One point, with a bar from its lowest to its highest; `number` is its model's."""
    colour = _COLOURS[(number if measured else point.line) % len(_COLOURS)]
    spread = [[point.tokens_per_s - point.low], [point.high - point.tokens_per_s]]
    first = measured or point.line == 0
    axes.errorbar(
        point.read_bytes / 1e6,
        point.tokens_per_s,
        yerr=spread,
        fmt=_MARKERS[number % len(_MARKERS)],
        color=colour,
        markersize=6,
        markerfacecolor=colour if measured else "white",
        capsize=3,
        label=point.label if first else None,
    )


def _plain(value: float, place: int | None = None) -> str:
    """A tick's number, at 1, 2 and 5 times a power of ten."""
    return f"{value:,.6g}" if f"{value:e}"[0] in "125" else ""
