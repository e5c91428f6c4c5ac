"""Polylines of lane masks: where lines are drawn, they are found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.driving.polylines import lane_polylines

LINES = [[(10, 5), (30, 90)], [(80, 10), (60, 50), (75, 95)]]


def drawn(lines: list[list[tuple[int, int]]], width: int = 3) -> np.ndarray:
    image = Image.new("1", (100, 100))
    for line in lines:
        ImageDraw.Draw(image).line(line, fill=1, width=width)
    return np.asarray(image)


def distance(points: np.ndarray, line: np.ndarray) -> float:
    """The largest distance from points to a polyline, which is sampled finely."""
    t = np.linspace(0, 1, 400)[:, None]
    pairs = itertools.pairwise(line)
    fine = np.concatenate([a + t * (b - a) for a, b in pairs])
    return float(np.linalg.norm(points[:, None] - fine[None], axis=2).min(axis=1).max())


@pytest.mark.parametrize("width", [1, 3])
def test_lines_that_are_drawn_are_found_with_few_points(width: int) -> None:
    found = lane_polylines(drawn(LINES, width))
    assert len(found) == 2
    for line, points in zip(LINES, sorted(found, key=lambda one: float(one[0, 0])), strict=True):
        # A pixel for the line's width, one for what is left out, and half a one of the raster.
        assert distance(points, np.array(line) + 0.5) < 2.5
        assert distance(np.array(line) + 0.5, points.astype(float)) < 2.5
        assert len(points) <= 6
        assert bool((np.diff(points[:, 1]) > 0).all())


def test_lines_that_meet_are_two_and_each_pixel_row_is_of_one() -> None:
    found = lane_polylines(drawn([[(20, 5), (50, 60)], [(80, 5), (50, 60)], [(50, 60), (50, 95)]]))
    assert len(found) == 2
    assert found[0][-1, 1] == pytest.approx(95.5, abs=1.5)
    assert found[1][-1, 1] == pytest.approx(60, abs=5)


def test_specks_and_empty_masks_are_no_lines() -> None:
    mask = np.zeros((40, 40), bool)
    assert lane_polylines(mask) == []
    mask[3:6, 3:6] = True
    assert lane_polylines(mask) == []
