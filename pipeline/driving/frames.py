"""Labels of one image as BDD100K writes them: the form of 2018, and Scalabel's since 2020."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pipeline.driving.sample import NO_BOXES, Complaints

_STEPS = 12  # straight pieces of a curve
Points = list[tuple[float, float]]
# Vehicles are one class, as YOLOP and its kin have it; what the others are is known.
VEHICLES = ("car", "bus", "truck", "train", "caravan", "trailer")
_OTHERS = (
    "pedestrian", "person", "rider", "motorcycle", "motor", "bicycle", "bike", "traffic light",
    "traffic sign", "other person", "other vehicle",
)  # fmt: skip
_DRIVABLE = ("direct", "alternative", "area/drivable", "area/alternative")
# Paint across the road and kerbs are no lines that a lane is kept by.
_NO_LINES = ("crosswalk", "road curb", "area/unknown")
_SMALLEST = 1.0  # pixels
_LINE_WIDTH_AT = 8 / 1280  # of a lane line, of the width of the image


def _flatten(points: Sequence[Sequence[float]], types: str, *, closed: bool) -> Points:
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


def _draw_polygon(mask: np.ndarray, corners: Points) -> None:
    """Set bool [H, W] inside a polygon."""
    mask |= _drawn(mask.shape, lambda draw: draw.polygon(corners, fill=1))


def _draw_line(mask: np.ndarray, corners: Points, width: int) -> None:
    """Set bool [H, W] along a line of so many pixels."""
    mask |= _drawn(mask.shape, lambda draw: draw.line(corners, fill=1, width=width, joint="curve"))


def _drawn(shape: tuple[int, ...], paint: object) -> np.ndarray:
    image = Image.new("L", (shape[1], shape[0]))
    paint(ImageDraw.Draw(image))  # type: ignore[operator]
    return np.asarray(image).astype(bool)


@dataclass(frozen=True)
class FrameLabels:
    """Labels of one image, in its pixels.

    Attributes:
        boxes: float32 [N, 4], half open.
        ignored: float32 [M, 4], crowds.
        areas: corners of drivable polygons.
        lines: corners of lane lines; with whether they are closed.
        kinds: which of `boxes`, `drivable`, `lane` the labels speak of.
    """

    boxes: np.ndarray
    ignored: np.ndarray
    areas: list[Points]
    lines: list[tuple[Points, bool]]
    kinds: frozenset[str]

    def drivable_mask(self, shape: tuple[int, int]) -> np.ndarray:
        """Where one may drive, bool [H, W]."""
        mask = np.zeros(shape, bool)
        for corners in self.areas:
            _draw_polygon(mask, corners)
        return mask

    def lane_mask(self, shape: tuple[int, int]) -> np.ndarray:
        """Lane lines, bool [H, W]: 8 pixels wide in an image of 1280, as YOLOP draws them."""
        mask = np.zeros(shape, bool)
        width = max(1, round(_LINE_WIDTH_AT * shape[1]))
        for corners, closed in self.lines:
            _draw_polygon(mask, corners) if closed else _draw_line(mask, corners, width)
        return mask


def labels_of(frame: dict[str, Any]) -> list[dict[str, Any]]:
    """The labels of a frame in either form; none where there are none."""
    nested = frame.get("frames")
    if isinstance(nested, list):
        frame = nested[0] if nested and isinstance(nested[0], dict) else {}
    found = frame.get("labels", frame.get("objects"))
    return [label for label in found or () if isinstance(label, dict)]


def read_frame(labels: list[dict[str, Any]], name: str, complaints: Complaints) -> FrameLabels:
    """Sort the labels of an image; what cannot be used is counted and named.

    Args:
        labels: as `labels_of` finds them.
        name: of the image.
        complaints: added to.
    """
    boxes: list[list[float]] = []
    ignored: list[list[float]] = []
    areas, kinds = [], set()
    lines: list[tuple[Points, bool]] = []
    for label in labels:
        category = str(label.get("category"))
        if label.get("box2d") is not None:
            kinds.add("boxes")
            box = _box(label["box2d"], category, name, complaints)
            if box is not None:
                attributes = label.get("attributes")
                crowd = isinstance(attributes, dict) and attributes.get("crowd") is True
                (ignored if crowd else boxes).append(box)
            continue
        is_area = category in _DRIVABLE
        for corners, closed in _paths(label, is_area, category, name, complaints):
            kinds.add("drivable" if is_area else "lane")
            if is_area:
                areas.append(corners)
            elif category.removeprefix("lane/") not in _NO_LINES and not _is_crosswise(label):
                lines.append((corners, closed))
    stacked = [np.array(b, np.float32) if b else NO_BOXES for b in (boxes, ignored)]
    return FrameLabels(stacked[0], stacked[1], areas, lines, frozenset(kinds))


def _is_crosswise(label: dict[str, Any]) -> bool:
    """Whether paint lies across the road, as a stop line does."""
    found = label.get("attributes")
    told = found if isinstance(found, dict) else {}
    return "vertical" in (told.get("direction"), told.get("laneDirection"))


def _box(box: Any, category: str, name: str, complaints: Complaints) -> list[float] | None:
    """A vehicle's box, half open: the last pixel that BDD100K names is inside it."""
    if category not in VEHICLES:
        known = "of another category" if category in _OTHERS else "of an unknown category"
        complaints.add(f"boxes {known}, {category}", name)
        return None
    try:
        x1, y1, x2, y2 = (float(box[side]) for side in ("x1", "y1", "x2", "y2"))
    except (KeyError, TypeError, ValueError):
        complaints.add("boxes without four numbers", name)
        return None
    if not all(math.isfinite(side) for side in (x1, y1, x2, y2)):
        complaints.add("boxes with sides that are no numbers", name)
    elif x2 + 1 - x1 < _SMALLEST or y2 + 1 - y1 < _SMALLEST:
        complaints.add("boxes whose end is before their beginning", name)
    elif min(x1, y1) >= 0 and 0 < max(x2, y2) <= 1:
        complaints.add("boxes between 0 and 1, where pixels are meant", name)
    else:
        return [x1, y1, x2 + 1, y2 + 1]
    return None


def _paths(
    label: dict[str, Any], is_area: bool, category: str, name: str, complaints: Complaints
) -> Iterator[tuple[Points, bool]]:
    """The poly2d of a label, flattened, and whether each is closed."""
    found = label.get("poly2d")
    if found is None:
        complaints.add(f"labels without box or polygon, {category}", name)
        return
    parts = found if isinstance(found, list) else [found]
    if parts and isinstance(parts[0], list):  # 2018: [[x, y, "L"], ...]
        parts = [{"points": parts}]
    for part in parts:
        try:
            points, types = _points_of(part)
            closed = bool(part.get("closed", is_area))
            yield _flatten(points, types, closed=closed), closed
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            complaints.add(f"polygons that are broken, {category}", f"{name}: {error}")


def _points_of(part: dict[str, Any]) -> tuple[list[list[float]], str]:
    if "points" in part:
        return [point[:2] for point in part["points"]], "".join(p[2] for p in part["points"])
    return part["vertices"], part["types"]
