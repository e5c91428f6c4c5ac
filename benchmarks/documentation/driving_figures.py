"""Figures of the driving network: its training, and what rounding costs it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.documentation.markdown import Figure, bold, only_row, percent, table

_Json = dict[str, Any]
_SCORES = ("ap50", "drivable_miou", "lane_iou")
_HEADINGS = ["AP50", "drivable mIoU", "lane IoU"]
_CONTROL = "float, further steps"


def _cells(scores: _Json, errors: _Json) -> list[str]:
    """A score with its standard error, for each of the three; empty where it is not known."""
    return [
        "" if scores[name] is None else f"{scores[name]:.3f} ± {errors[name]:.3f}"
        for name in _SCORES
    ]


def _training(found: _Json) -> list[str]:
    """Scores on images of both sets that no stage was trained on, stage by stage."""

    def cells() -> Iterator[list[str]]:
        settings = found["settings"]
        names = {"first": settings["data"].split(":")[0], "second": settings["second_data"]}
        for stage in found["stages"]:
            for key, scored in stage["scores"].items():
                shown = _cells(scored["scores"], scored["standard_errors"])
                yield [stage["name"], names[key], f"{scored['images']}", *shown]

    return table(["stage", "scored on", "images", *_HEADINGS], cells(), left=2)


def _minutes(found: _Json) -> list[str]:
    """How long the training took."""
    return [f"{found['seconds'] / 60:.0f}"]


def _ladder(found: _Json) -> list[str]:
    """What rounding costs, and what training under it wins back of that against the control."""

    def cells() -> Iterator[list[str]]:
        for row in found["rows"]:
            bits = "" if row["bits"] is None else str(row["bits"])
            won = row.get("won_back") or {}
            # Of a loss within its standard error, a share says nothing.
            shares = [percent(won[name], 0) for name in _SCORES] if won and row["bits"] < 8 else []
            name = bold(row["name"], row["name"] == _CONTROL)
            shown = _cells(row["scores"], row["standard_errors"])
            yield [name, bits, *shown, " / ".join(shares)]

    return table(["", "bits", *_HEADINGS, "won back"], cells())


def _row(found: _Json, threads: int = 1) -> _Json:
    """The row of so many threads."""
    return only_row(found["rows"], threads=threads)


_CPU = ("driving_cpu",)
DRIVING_FIGURES = {
    "driving/cpu-float": Figure(_CPU, lambda found: [f"{_row(found)['ms']['float32']:.1f}"]),
    "driving/cpu-int8": Figure(_CPU, lambda found: [f"{_row(found)['ms']['int8']:.1f}"]),
    "driving/cpu-two": Figure(_CPU, lambda found: [f"{_row(found, 2)['times_as_fast']:.2f}"]),
    "driving/cpu-ratio": Figure(_CPU, lambda found: [f"{_row(found)['times_as_fast']:.2f}"]),
    "driving/training": Figure(("driving_training",), _training),
    "driving/minutes": Figure(("driving_training",), _minutes),
    "driving/camvid": Figure(("driving_camvid",), _training),
    "driving/ladder": Figure(("driving_ladder",), _ladder),
}
