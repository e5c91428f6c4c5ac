"""Traffic: vehicles as bodies of cuboids on the road, and what is no vehicle beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.driving.scenes.camera import Camera
from pipeline.driving.scenes.domain import Domain
from pipeline.driving.scenes.road import Road

# Length, width, height in metres, and the part of the height below the windows.
_BODIES = {
    "car": ((3.9, 1.7, 1.4), (4.8, 1.9, 1.6), 0.58),
    "van": ((4.6, 1.8, 1.9), (5.4, 2.0, 2.4), 0.5),
    "truck": ((6.0, 2.2, 2.6), (11.0, 2.5, 3.8), 0.3),
    "bus": ((9.0, 2.4, 2.9), (12.0, 2.6, 3.3), 0.4),
    "motorcycle": ((1.8, 0.6, 1.5), (2.2, 0.8, 1.75), 0.45),
}
# A van is a car to BDD100K.
_CATEGORIES = {"van": "car"}
_NEAREST_M = 3.0
_Corners = Sequence[tuple[float, float, float]]
# Fills a face: its corners, across, up and along from the middle of the nearer end; its colour.
_Painter = Callable[[_Corners, tuple[float, ...]], None]
_GLASS, _TYRE = (0.09, 0.11, 0.14), (0.04, 0.04, 0.045)


@dataclass(frozen=True)
class _Vehicle:
    """A body on the road.

    Attributes:
        kind: of _BODIES.
        x: of its middle, metres.
        z: of its nearer end, metres.
        heading: radians from straight ahead, of the road there.
        size: length, width, height in metres.
        colour: [3], 0 to 1.
        oncoming: shows its front.
    """

    kind: str
    x: float
    z: float
    heading: float
    size: tuple[float, float, float]
    colour: tuple[float, float, float]
    oncoming: bool

    @property
    def category(self) -> str:
        """As BDD100K calls it."""
        return _CATEGORIES.get(self.kind, self.kind)


def draw_traffic(road: Road, domain: Domain, rng: np.random.Generator) -> list[_Vehicle]:
    """Vehicles on their lanes and beside the road, the farthest first."""
    found = []
    for begin, end, ours in road.lanes:
        z = rng.uniform(5, 25)
        for _ in range(int(rng.integers(0, domain.vehicles + 1))):
            kind = str(rng.choice(["car", "van", "truck", "bus"], p=[0.68, 0.14, 0.12, 0.06]))
            vehicle = _placed(kind, (begin + end) / 2 + rng.normal(0, 0.2), z, not ours, road, rng)
            found.append(vehicle)
            z += vehicle.size[0] + rng.uniform(4, 30)
    if rng.random() < 0.3:  # parked in a row
        z = rng.uniform(6, 20)
        for _ in range(int(rng.integers(1, 5))):
            found.append(_placed("car", road.edges[1] + 1.5, z, False, road, rng))
            z += rng.uniform(5.5, 8)
    for _ in range(int(rng.integers(0, domain.two_wheels + 1))):
        place = rng.uniform(road.edges[0], road.edges[1])
        found.append(_placed("motorcycle", place, rng.uniform(6, 35), place < 0, road, rng))
    return sorted((v for v in found if v.z < 90), key=lambda v: -v.z)


def _placed(
    kind: str, u: float, z: float, oncoming: bool, road: Road, rng: np.random.Generator
) -> _Vehicle:
    low, high, _ = _BODIES[kind]
    length, width, height = (float(s) for s in rng.uniform(low, high))
    heading = float(np.arctan(road.slope + road.bend * z))
    shade = rng.uniform(0.05, 0.95)
    colour = shade + (rng.uniform(-0.35, 0.35, 3) if rng.random() < 0.5 else np.zeros(3))
    r, g, b = (float(c) for c in np.clip(colour, 0.03, 0.95))
    x = float(road.axis(z) + u)
    return _Vehicle(kind, x, float(z), heading, (length, width, height), (r, g, b), oncoming)


def render(
    vehicle: _Vehicle, canvas: Image.Image, camera: Camera, light: float
) -> np.ndarray | None:
    """Draw a vehicle over what is there.

    Args:
        vehicle: what.
        canvas: RGB.
        camera: that sees it.
        light: of the scene, 1 by day; lamps shine all the same.

    Returns:
        bool [H, W], the pixels that it covers; None where it is not in sight.
    """
    if vehicle.z < _NEAREST_M:
        return None
    shape = Image.new("L", canvas.size)
    brush, stencil = ImageDraw.Draw(canvas), ImageDraw.Draw(shape)

    def face(corners: _Corners, colour: tuple[float, ...]) -> None:
        points = [(float(c), float(r)) for c, r in camera.project(_on_road(vehicle, corners))]
        brush.polygon(points, fill=_bytes(colour))
        stencil.polygon(points, fill=1)

    _shadow(vehicle, brush, camera)
    _body(vehicle, face, light)
    covered = np.asarray(shape).astype(bool)
    return covered if covered.any() else None


def _on_road(vehicle: _Vehicle, corners: _Corners) -> np.ndarray:
    """Points [N, 3] of the world; across, up and along from the middle of the nearer end."""
    across, up, along = np.array(corners, np.float64).T
    cos, sin = np.cos(vehicle.heading), np.sin(vehicle.heading)
    x = vehicle.x + cos * across + sin * along
    z = np.maximum(vehicle.z + cos * along - sin * across, 0.5)
    return np.stack((x, up, z), axis=1)


def _shadow(vehicle: _Vehicle, brush: ImageDraw.ImageDraw, camera: Camera) -> None:
    half, length = vehicle.size[1] / 2 + 0.1, vehicle.size[0]
    corners = [(-half, 0, -0.15), (half, 0, -0.15), (half, 0, length), (-half, 0, length)]
    points = camera.project(_on_road(vehicle, [(a, 0.0, c) for a, _, c in corners]))
    brush.polygon([(float(c), float(r)) for c, r in points], fill=(14, 14, 16))


def _body(vehicle: _Vehicle, paint: _Painter, light: float) -> None:
    """The sides that are seen: one flank, the roof, then the nearer end with its lamps."""
    if vehicle.kind == "motorcycle":
        _rider(paint, vehicle, light)
        return
    length, width, height = vehicle.size
    half = width / 2
    waist = _BODIES[vehicle.kind][2] * height
    roof_half, inset = half * 0.86, 0.12 * length if vehicle.kind == "car" else 0.0
    lit = tuple(c * light for c in vehicle.colour)
    side = -1.0 if vehicle.x - vehicle.heading * vehicle.z > 0 else 1.0
    dark = tuple(c * 0.72 for c in lit)
    glass = tuple(c * (0.4 + light) for c in _GLASS)
    s, r = side * half, side * roof_half
    paint([(s, 0.18, 0), (s, waist, 0), (s, waist, length), (s, 0.18, length)], dark)
    top = [(s, waist, 0), (r, height, inset), (r, height, length - inset), (s, waist, length)]
    paint(top, glass if vehicle.kind in ("car", "van", "bus") else dark)
    roof = [(-roof_half, height, inset), (roof_half, height, inset)]
    roof += [(roof_half, height, length - inset), (-roof_half, height, length - inset)]
    paint(roof, tuple(min(1.0, c * 1.15) for c in lit))
    _wheels(paint, side * (half + 0.01), length, light)
    paint([(-half, 0.2, 0), (half, 0.2, 0), (half, waist, 0), (-half, waist, 0)], lit)
    upper = [(-half, waist, 0), (half, waist, 0), (roof_half, height, inset)]
    paint([*upper, (-roof_half, height, inset)], lit)
    if vehicle.kind != "truck" or vehicle.oncoming:
        low, high = waist + 0.06 * height, height * 0.95
        window = [(-half * 0.85, low, 0), (half * 0.85, low, 0), (roof_half * 0.85, high, inset)]
        paint([*window, (-roof_half * 0.85, high, inset)], glass)
    _end(paint, vehicle, half, waist, light)


def _rider(paint: _Painter, vehicle: _Vehicle, light: float) -> None:
    """A motorcycle from its end, and who sits on it."""
    _, width, height = vehicle.size
    half = width / 2
    tyre = tuple(c * (0.4 + light) for c in _TYRE)
    lit = tuple(c * light for c in vehicle.colour)
    paint([(-0.08, 0, 0), (0.08, 0, 0), (0.08, 0.65, 0), (-0.08, 0.65, 0)], tyre)
    paint([(-half, 0.6, 0), (half, 0.6, 0), (0.15, 0.85, 0), (-0.15, 0.85, 0)], tyre)
    top = height - 0.3
    paint([(-0.22, 0.6, 0), (0.22, 0.6, 0), (half, top, 0), (-half, top, 0)], lit)
    helmet = [(0.14 * np.cos(a), top + 0.15 + 0.15 * np.sin(a), 0.0) for a in np.arange(8) * 0.785]
    paint(helmet, tuple(c * 0.6 for c in lit))
    lamp = (1.0, 0.98, 0.85) if vehicle.oncoming else (0.85, 0.08, 0.06)
    paint([(-0.07, 0.55, 0), (0.07, 0.55, 0), (0.07, 0.67, 0), (-0.07, 0.67, 0)], lamp)


def _wheels(paint: _Painter, side: float, length: float, light: float) -> None:
    tyre = tuple(c * (0.4 + light) for c in _TYRE)
    for middle in (0.18 * length, 0.82 * length):
        angle = np.linspace(0, 2 * np.pi, 9)[:-1]
        paint([(side, 0.33 + 0.33 * np.sin(a), middle + 0.33 * np.cos(a)) for a in angle], tyre)


def _end(paint: _Painter, vehicle: _Vehicle, half: float, waist: float, light: float) -> None:
    """Bumper, plate, tyres and lamps of the nearer end."""
    tyre = tuple(c * (0.4 + light) for c in _TYRE)
    for side in (-1, 1):
        inner = side * half * 0.6
        paint([(inner, 0, 0), (side * half, 0, 0), (side * half, 0.3, 0), (inner, 0.3, 0)], tyre)
        lamp = (1.0, 0.98, 0.85) if vehicle.oncoming else (0.85, 0.08, 0.06)
        strength = 1.0 if light < 0.5 else 0.75
        low, high = waist * 0.72, waist * 0.95
        corners = [(side * half * 0.62, low, -0.01), (side * half * 0.97, low, -0.01)]
        corners += [(side * half * 0.97, high, -0.01), (side * half * 0.62, high, -0.01)]
        paint(corners, tuple(c * strength for c in lamp))
    plate = [(-0.25, waist * 0.5, -0.01), (0.25, waist * 0.5, -0.01)]
    plate += [(0.25, waist * 0.5 + 0.12, -0.01), (-0.25, waist * 0.5 + 0.12, -0.01)]
    paint(plate, tuple(0.8 * light + 0.1 for _ in range(3)))


def _bytes(colour: tuple[float, ...]) -> tuple[int, int, int]:
    r, g, b = (int(255 * min(1.0, max(0.0, c))) for c in colour)
    return r, g, b
