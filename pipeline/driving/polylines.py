"""From a mask of thin lines to polylines: NumPy alone."""

from __future__ import annotations

import numpy as np

_LEAST_ROWS = 5
_MOST_OFF = 1.0  # pixels that a polyline may be from the middle of its line


def lane_polylines(mask: np.ndarray) -> list[np.ndarray]:
    """Lines through the middles of a mask's runs, which are followed from row to row.

    A run goes on with the nearest one of the row below that touches it, and each with one alone:
    where lines meet, one goes on and the other ends. What spans fewer than five rows is left out.

    Args:
        mask: bool [H, W].

    Returns:
        Of each line float32 [N, 2], x and y in pixels, from the top down; the longest line first.
    """
    lines: list[list[tuple[float, float]]] = []
    open_lines: list[tuple[int, int, list[tuple[float, float]]]] = []
    for y, row in enumerate(mask):
        runs = _runs(row)
        found: dict[int, list[tuple[float, float]]] = {}
        pairs = sorted(
            (abs(begin + end - first - last), number, place)
            for number, (begin, end, _) in enumerate(open_lines)
            for place, (first, last) in enumerate(runs)
            if first <= end and begin <= last
        )
        taken = set()
        for _, number, place in pairs:
            if number not in taken and place not in found:
                taken.add(number)
                found[place] = open_lines[number][2]
        open_lines = []
        for place, (first, last) in enumerate(runs):
            line = found.get(place)
            if line is None:
                line = []
                lines.append(line)
            line.append(((first + last) / 2, y + 0.5))
            open_lines.append((first, last, line))
    long = sorted((line for line in lines if len(line) >= _LEAST_ROWS), key=len, reverse=True)
    return [_simplified(np.array(line)).astype(np.float32) for line in long]


def _runs(row: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end, half open, of what is set in a row."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], row, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _simplified(points: np.ndarray) -> np.ndarray:
    """Fewer points from which none of the others is far (Ramer, Douglas and Peucker)."""
    if len(points) < 3:
        return points
    along = points[-1] - points[0]
    length = max(float(np.hypot(*along)), 1e-9)
    beside = points - points[0]
    off = np.abs(along[0] * beside[:, 1] - along[1] * beside[:, 0]) / length
    worst = int(off.argmax())
    if off[worst] <= _MOST_OFF:
        return points[[0, -1]]
    parts = _simplified(points[: worst + 1]), _simplified(points[worst:])
    return np.concatenate((parts[0][:-1], parts[1]))
