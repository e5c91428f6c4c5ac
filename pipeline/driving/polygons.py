"""Polygons and poly-lines of labels, with Bezier curves in them, as masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_STEPS = 12  # straight pieces of a curve
Points = list[tuple[float, float]]


def flatten(points: Sequence[Sequence[float]], types: str, *, closed: bool) -> Points:
    """Corners of a path in which some points are controls of cubic Bezier curves.

    Args:
        points: x and y each.
        types: a letter a point: L is on the path, two C between are the controls of a curve.
        closed: the last point is joined to the first.

    Raises:
        ValueError: letters and points differ in number, there are other letters, or controls do not
            come in pairs between points.
    """
    if len(points) != len(types) or set(types) - {"L", "C"}:
        raise ValueError(f"{len(points)} points, types {types!r}")
    if len(points) < (3 if closed else 2) or types[0] != "L":
        raise ValueError(f"{len(points)} points that begin with {types[:1]!r}")
    path = [(float(p[0]), float(p[1])) for p in points]
    if not np.isfinite(np.array(path)).all():
        raise ValueError("a point that is no number")
    if closed:
        path, types = [*path, path[0]], types + "L"
    flat, place = [path[0]], 1
    while place < len(path):
        if types[place] == "L":
            flat.append(path[place])
            place += 1
            continue
        if types[place : place + 3] != "CCL":
            raise ValueError(f"a curve that does not end, types {types!r}")
        flat += _curve(np.array(path[place - 1 : place + 3]))
        place += 3
    return flat


def _curve(control: np.ndarray) -> Points:
    """Points of a cubic Bezier curve of four controls [4, 2], without its first."""
    t = np.linspace(0, 1, _STEPS + 1)[1:, None]
    weights = np.concatenate(((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3), axis=1)
    return [(float(x), float(y)) for x, y in weights @ control]


def draw_polygon(mask: np.ndarray, corners: Points) -> None:
    """Set bool [H, W] inside a polygon."""
    mask |= _drawn(mask.shape, lambda draw: draw.polygon(corners, fill=1))


def draw_line(mask: np.ndarray, corners: Points, width: int) -> None:
    """Set bool [H, W] along a line of so many pixels."""
    mask |= _drawn(mask.shape, lambda draw: draw.line(corners, fill=1, width=width, joint="curve"))


def _drawn(shape: tuple[int, ...], paint: object) -> np.ndarray:
    image = Image.new("L", (shape[1], shape[0]))
    paint(ImageDraw.Draw(image))  # type: ignore[operator]
    return np.asarray(image).astype(bool)
