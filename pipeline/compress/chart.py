"""The plan as a picture: how much of every matrix is kept, layer by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.compress.plan import RankPlan


def save_plan_chart(plan: RankPlan, path: Path) -> None:
    """Write an SVG: layers across, linears down, colour for the fraction kept.

    A stack that shares its right factor has one colour, and an outline around its members.
    """
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
            kept[rows, column] = group.kept_parameters / group.dense_parameters
            if len(rows) > 1 and group.form != "dense":
                shared.append((column, rows))
    # Without a date, and with names inside that do not change from run to run.
    with rc_context({"svg.hashsalt": "skipcat"}):
        _draw(kept, roles, shared, plan.kept_fraction).savefig(path, metadata={"Date": None})


def _draw(
    kept: np.ndarray, roles: list[str], shared: list[tuple[int, list[int]]], total: float
) -> Figure:
    figure = Figure(figsize=(2.5 + 0.3 * kept.shape[1], 1.4 + 0.32 * len(roles)), layout="tight")
    axes = figure.add_subplot()
    image = axes.imshow(kept, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for column, rows in shared:
        axes.plot([column] * len(rows), rows, color="white", linewidth=1, marker=".", markersize=3)
    axes.set_yticks(range(len(roles)), roles, fontsize=8)
    axes.set_xlabel("layer")
    axes.set_title(
        f"parameters kept of each matrix; {total:.1%} in all (dots joined: one right factor)",
        fontsize=9,
    )
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}")
    return figure
