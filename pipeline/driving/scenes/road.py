"""The road: lanes and their directions, paint that parts them, and paint that does not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.driving.scenes.camera import Camera
from pipeline.driving.scenes.domain import Domain

_LABELLED_M = 60.0  # lane lines farther away are too thin to be labelled
_LEAST_PIXELS = 2.2  # a labelled line is not thinner than this in the finished image
_PAINT_M = 0.14
_DASH_M, _GAP_M = 3.0, 6.0
_DOUBLE_APART_M = 0.3
_WHITE, _YELLOW = np.array([[0.86, 0.86, 0.84], [0.82, 0.64, 0.2]], np.float32)


@dataclass(frozen=True)
class _Line:
    """Paint along the road.

    Attributes:
        place_m: across the road, from its axis.
        colour: [3], 0 to 1.
        style: `solid`, `dashed` or `double`.
    """

    place_m: float
    colour: np.ndarray
    style: str


@dataclass(frozen=True)
class Road:
    """A road as it is seen from one of its lanes.

    Attributes:
        offset_m: of its axis from the camera.
        slope: of its axis at the camera.
        bend: curvature of its axis, 1 / m.
        lanes: left edge, right edge and whether it is of our direction, from the left.
        lines: paint that lanes are kept by.
        crosswalk_m: where one begins; None has none.
        arrows: lane and distance of each.
    """

    offset_m: float
    slope: float
    bend: float
    lanes: tuple[tuple[float, float, bool], ...]
    lines: tuple[_Line, ...]
    crosswalk_m: float | None
    arrows: tuple[tuple[int, float], ...]

    @classmethod
    def drawn(cls, domain: Domain, rng: np.random.Generator) -> Road:
        """A road of a domain; oncoming lanes are on the left."""
        ours = int(rng.integers(1, domain.own_lanes + 1))
        theirs = int(rng.integers(0, domain.oncoming_lanes + 1))
        width = rng.uniform(*domain.lane_width_m)
        edges = [float((place - theirs) * width) for place in range(ours + theirs + 1)]
        lanes = tuple((a, b, a >= -1e-6) for a, b in pairwise(edges))
        own = theirs + int(rng.integers(ours))
        middle = (lanes[own][0] + lanes[own][1]) / 2
        far = rng.uniform(12, 45)
        return cls(
            float(-middle + rng.normal(0, 0.25)),
            float(rng.normal(0, 0.015)),
            float(rng.uniform(-domain.bend, domain.bend)),
            lanes,
            tuple(_lines(edges, theirs, domain, rng)),
            float(far) if rng.random() < 0.25 else None,
            tuple(
                (place, float(rng.uniform(7, 30)))
                for place in range(len(lanes))
                if rng.random() < 0.25
            ),
        )

    def axis(self, z: np.ndarray | float) -> np.ndarray:
        """X of the road's axis at distances Z."""
        near = np.minimum(z, 1e4)
        return np.asarray(self.offset_m + self.slope * near + 0.5 * self.bend * near**2)

    @property
    def edges(self) -> tuple[float, float]:
        """Where lanes begin and end, across the road from its axis."""
        return self.lanes[0][0], self.lanes[-1][1]


def _lines(
    edges: list[float], theirs: int, domain: Domain, rng: np.random.Generator
) -> list[_Line]:
    """Lines between lanes, at the edges, and where the directions meet."""
    lines = []
    for place, edge in enumerate(edges):
        if place in (0, len(edges) - 1):
            if rng.random() < 0.75:
                at_centre = place == 0 and not theirs and domain.yellow_centre
                lines.append(_Line(edge, _YELLOW if at_centre else _WHITE, "solid"))
        elif place == theirs:
            colour = _YELLOW if domain.yellow_centre else _WHITE
            lines.append(_Line(edge, colour, "double" if rng.random() < 0.6 else "solid"))
        else:
            lines.append(_Line(edge, _WHITE, "dashed"))
    return lines


@dataclass(frozen=True)
class _PaintedRoad:
    """A road in pixels.

    Attributes:
        colour: float32 [H, W, 3], 0 to 1; only where `there`.
        there: bool [H, W], the road itself.
        drivable: bool [H, W], lanes of our direction.
        lane: bool [H, W], lane lines, through the gaps of dashed ones.
    """

    colour: np.ndarray
    there: np.ndarray
    drivable: np.ndarray
    lane: np.ndarray


def paint_road(
    road: Road,
    camera: Camera,
    ground: tuple[np.ndarray, np.ndarray],
    domain: Domain,
    scale: int,
    rng: np.random.Generator,
) -> _PaintedRoad:
    """Colour every pixel of the road by where it lies on it.

    Args:
        road: its lanes and lines.
        camera: that sees it.
        ground: as the camera gives it.
        domain: of its asphalt and paint.
        scale: pixels of this picture in one of the finished image, along a side.
        rng: of patches, wear and shadows.
    """
    top = int(np.isfinite(ground[1]).any(axis=1).argmax())
    x, z = (part[top:] for part in ground)
    u = x - road.axis(z)
    left, right = road.edges
    shoulder = float(rng.uniform(0.2, 1.2))
    there = np.isfinite(z) & (u > left - shoulder) & (u < right + shoulder)
    near, u = np.where(there, z, np.float32(1)), np.where(there, u, np.float32(0))
    colour = _asphalt(u, near, domain, rng)
    pixel_m = near / camera.focal  # across the road, of one pixel of this picture
    fade = _noise(u * 3, near * 1.5, rng) > float(rng.uniform(0, domain.worn))
    lane = np.zeros_like(there)
    for line in road.lines:
        away = np.abs(u - line.place_m)
        half = _PAINT_M / 2
        covered = _painted(line, u, near, pixel_m, rng)
        strength = (covered * fade * float(rng.uniform(0.6, 1.0)))[..., None]
        colour += (line.colour - colour) * strength
        if line.style == "double":
            half += _DOUBLE_APART_M / 2
        wide = np.maximum(half, pixel_m * scale * _LEAST_PIXELS / 2)
        lane |= there & (away < wide) & (z < _LABELLED_M)
    colour = _paint_across(colour, road, u, near, fade)
    drivable = np.zeros_like(there)
    for begin, end, ours in road.lanes:
        drivable |= there & ours & (u >= begin) & (u < end)
    whole = [(top, 0), (0, 0)]
    masks = (np.pad(mask, whole) for mask in (there, drivable, lane))
    return _PaintedRoad(np.pad(colour, [*whole, (0, 0)]), *masks)


def _painted(
    line: _Line, u: np.ndarray, z: np.ndarray, pixel_m: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """How much of each pixel a line's paint covers, 0 to 1."""
    apart = _DOUBLE_APART_M / 2 if line.style == "double" else 0.0
    covered = np.zeros_like(u)
    for side in {-apart, apart}:
        inside = (_PAINT_M / 2 - np.abs(u - line.place_m - side)) / pixel_m + 0.5
        covered = np.maximum(covered, np.clip(inside, 0, np.minimum(1, _PAINT_M / pixel_m)))
    if line.style == "dashed":
        covered = covered * ((z + float(rng.uniform(0, 9))) % (_DASH_M + _GAP_M) < _DASH_M)
    return covered


def _paint_across(
    colour: np.ndarray, road: Road, u: np.ndarray, z: np.ndarray, fade: np.ndarray
) -> np.ndarray:
    """Crosswalk and arrows: as white as lane lines, and none."""
    left, right = road.edges
    paint = np.zeros_like(fade)
    if road.crosswalk_m is not None:
        at = (z > road.crosswalk_m) & (z < road.crosswalk_m + 3)
        paint |= at & (u > left) & (u < right) & ((u - left) % 1.0 < 0.5)
        stop = (z > road.crosswalk_m - 1.5) & (z < road.crosswalk_m - 1.1)
        paint |= stop & (u > 0) & (u < right)
    for place, distance in road.arrows:
        middle = (road.lanes[place][0] + road.lanes[place][1]) / 2
        along, across = z - distance, np.abs(u - middle)
        paint |= (along > 0) & (along < 2.5) & (across < 0.09)
        paint |= (along >= 2.5) & (along < 4) & (across < 0.45 * (4 - along) / 1.5)
    marked = paint & fade
    colour[marked] += (_WHITE - colour[marked]) * np.float32(0.85)
    return colour


def _asphalt(u: np.ndarray, z: np.ndarray, domain: Domain, rng: np.random.Generator) -> np.ndarray:
    """Grey with grain, patches, and shadows that lie across the road."""
    grey = float(rng.uniform(*domain.asphalt)) + 0.05 * (_noise(u * 8, z * 4, rng) - 0.5)
    grey = grey + 0.08 * (_noise(u * 0.4, z * 0.15, rng) - 0.5)
    for _ in range(int(rng.integers(0, 4))):
        at, across = rng.uniform(5, 40), rng.uniform(-6, 6)
        patch = (np.abs(z - at) < rng.uniform(0.5, 4)) & (np.abs(u - across) < rng.uniform(0.3, 2))
        grey[patch] += rng.uniform(-0.08, 0.06)
    if rng.random() < 0.3:
        begin, skew = float(rng.uniform(6, 40)), float(rng.normal(0, 0.6))
        shadow = np.abs(z + skew * u - begin) < rng.uniform(0.5, 5)
        grey[shadow] *= rng.uniform(0.45, 0.7)
    tint = (1 + rng.normal(0, 0.02, 3)).astype(np.float32)
    return np.clip(grey, 0, 1)[..., None] * tint


def _noise(x: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in 0 to 1 at points of the road, float [H, W]."""
    table = rng.random((64, 64), dtype=np.float32)  # it repeats, seamlessly but for one edge
    i, j = np.floor(x), np.floor(z)
    s, t = x - i, z - j
    place = (i.astype(np.int32) & 63) * 64 + (j.astype(np.int32) & 63)
    around = table.ravel()
    here, below = around[place], around[(place + 64) & 4095]
    right, across = around[(place + 1) & 4095], around[(place + 65) & 4095]
    here += (below - here) * s
    right += (across - right) * s
    blended: np.ndarray = here + (right - here) * t
    return blended
