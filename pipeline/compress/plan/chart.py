"""The plan as a picture: how much of every matrix is kept; quantised, how many bits a weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.compress.plan.file_bytes import group_bytes
from pipeline.compress.plan.plan import RankPlan
from pipeline.quantize.formats import RUNTIMES


def save_plan_chart(plan: RankPlan, path: Path) -> None:
    """Write an SVG: layers across, linears down, colour for the fraction kept.

    Where matrices are quantised, the colour is for the bits that are stored for each weight of
    the original, scales and all. A stack that shares its right factor has one colour, and an
    outline around its members.
    """
    is_quantized = any(group.up_format or group.down_format for group in plan.groups)
    roles = list(
        dict.fromkeys(
            member.removeprefix(f"{layer}.")
            for layer, groups in plan.layers.items()
            for group in groups
            for member in sorted(group.members)
        )
    )
    kept = np.full((len(roles), len(plan.layers)), np.nan)
    shared: list[tuple[int, list[int]]] = []
    for column, (layer, groups) in enumerate(plan.layers.items()):
        for group in groups:
            rows = [roles.index(member.removeprefix(f"{layer}.")) for member in group.members]
            stored_bits = 8 * group_bytes(group, RUNTIMES["any"])
            stored = stored_bits if is_quantized else group.kept_parameters
            kept[rows, column] = stored / group.dense_parameters
            if len(rows) > 1 and group.form != "dense":
                shared.append((column, rows))
    # Without a date, and with names inside that do not change from run to run.
    with rc_context({"svg.hashsalt": "skipcat"}):
        draw = partial(_draw, kept, roles, shared)
        total = f"{plan.kept_fraction:.1%}"
        if is_quantized:
            title = f"bits stored for each weight; {total} of the numbers (dots joined: one factor)"
            figure = draw(title, 8.0, lambda value, _: f"{value:.1f}")
        else:
            title = (
                f"parameters kept of each matrix; {total} in all (dots joined: one right factor)"
            )
            figure = draw(title, 1.0, lambda value, _: f"{value:.0%}")
        figure.savefig(path, metadata={"Date": None})


def _draw(
    values: np.ndarray,
    roles: list[str],
    shared: list[tuple[int, list[int]]],
    title: str,
    largest: float,
    tick: Callable[[float, int], str],
) -> Figure:
    figure = Figure(figsize=(2.5 + 0.3 * values.shape[1], 1.4 + 0.32 * len(roles)), layout="tight")
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0, vmax=largest, cmap="viridis", aspect="auto")
    for column, rows in shared:
        axes.plot([column] * len(rows), rows, color="white", linewidth=1, marker=".", markersize=3)
    axes.set_yticks(range(len(roles)), roles, fontsize=8)
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, format=tick)
    return figure
