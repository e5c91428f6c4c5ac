"""One scene: its picture, and its labels cut by what stands before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from pipeline.driving.frames import VEHICLES
from pipeline.driving.sample import Complaints, DrivingSet, Sample
from pipeline.driving.scenes.camera import FARTHEST_M, Camera
from pipeline.driving.scenes.domain import Domain
from pipeline.driving.scenes.road import Road, paint_road
from pipeline.driving.scenes.vehicles import draw_traffic, render

_SCALE = 2  # the picture is drawn so much larger, and averaged
_LEAST_SIDE = 5  # pixels, below which a vehicle is not labelled
_LEAST_VISIBLE = 0.25  # of it


def _draw_surroundings(camera: Camera, road: Road, rng: np.random.Generator) -> Image.Image:
    """RGB, all but the road and what is on it."""
    h, w = camera.size
    rows = np.arange(h)[:, None]
    sky = np.array([rng.uniform(0.45, 0.9), rng.uniform(0.55, 0.92), rng.uniform(0.7, 1.0)])
    pale = 0.5 + 0.5 * sky
    share = np.clip(rows / max(camera.horizon, 1), 0, 1)[..., None]
    upper = sky * (1 - share) + pale * share
    ground = np.array([rng.uniform(0.2, 0.5), rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.4)])
    colour = np.where((rows > camera.horizon)[..., None], ground, upper)
    grain = rng.standard_normal((h, w, 1), np.float32) * np.float32(0.015)
    colour = colour.astype(np.float32) + grain
    canvas = Image.fromarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))
    brush = ImageDraw.Draw(canvas)
    _skyline(brush, camera, rng)
    for _ in range(int(rng.integers(2, 10))):
        _beside(brush, camera, road, rng)
    return canvas


def _skyline(brush: ImageDraw.ImageDraw, camera: Camera, rng: np.random.Generator) -> None:
    """Far houses and trees along the horizon."""
    h, w = camera.size
    column = 0.0
    while column < w:
        width = rng.uniform(0.02, 0.14) * w
        top = camera.horizon - rng.uniform(0, 0.16) * h
        shade = rng.uniform(0.2, 0.6)
        green = rng.random() < 0.4
        colour = tuple(
            int(255 * shade * c) for c in ((0.6, 0.9, 0.5) if green else (1, 0.97, 0.92))
        )
        box = (column, top, column + width, camera.horizon + 2)
        brush.ellipse(box, fill=colour) if green else brush.rectangle(box, fill=colour)
        column += width * rng.uniform(0.5, 1.3)


def _beside(
    brush: ImageDraw.ImageDraw, camera: Camera, road: Road, rng: np.random.Generator
) -> None:
    """A tree, a pole, a sign, a wall or a pedestrian, standing beside the road."""
    z = rng.uniform(7, 60)
    left = rng.random() < 0.5
    away = rng.uniform(1.5, 7)
    x = float(road.axis(z)) + (road.edges[0] - away if left else road.edges[1] + away)
    kind = rng.choice(["tree", "pole", "sign", "wall", "pedestrian"])
    shade = rng.uniform(0.3, 0.8)
    grey = tuple(int(255 * shade) for _ in range(3))

    def box(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
        corners = camera.project(np.array([[x0, y1, z], [x1, y0, z]]))
        (a, b), (c, d) = corners
        return [(min(a, c), min(b, d)), (max(a, c), max(b, d))]

    if kind == "tree":
        size = rng.uniform(1, 2.5)
        brush.rectangle(box(x - 0.15, 0, x + 0.15, 2.5), fill=(70, 52, 38))
        green = (int(90 * shade), int(160 * shade), int(70 * shade))
        brush.ellipse(box(x - size, 2, x + size, 2 + 2 * size), fill=green)
    elif kind == "wall":
        long = rng.uniform(3, 9)
        brush.rectangle(box(x - long, 0, x + long, rng.uniform(1, 6)), fill=grey)
    elif kind == "pedestrian":
        brush.rectangle(box(x - 0.2, 0, x + 0.2, 0.85), fill=(30, 32, 50))
        brush.rectangle(box(x - 0.25, 0.8, x + 0.25, 1.45), fill=(int(255 * shade), 60, 70))
        brush.ellipse(box(x - 0.13, 1.45, x + 0.13, 1.75), fill=(190, 150, 120))
    else:
        brush.rectangle(box(x - 0.06, 0, x + 0.06, 2.4 if kind == "sign" else 6), fill=(95, 95, 98))
        if kind == "sign":
            board = (190, 30, 30) if rng.random() < 0.5 else (30, 70, 170)
            brush.rectangle(box(x - 0.4, 2, x + 0.4, 2.8), fill=board)


@dataclass(frozen=True)
class _Weather:
    """Of one scene.

    Attributes:
        light: of the surroundings, 1 by day.
        fog: optical depth of a metre.
        rain: streaks for each thousand pixels.
        warm: [3], the colour of the light.
    """

    light: float
    fog: float
    rain: float
    warm: np.ndarray

    @classmethod
    def drawn(cls, domain: Domain, rng: np.random.Generator) -> _Weather:
        """_Weather of a domain."""
        light, warm = rng.uniform(0.8, 1.1), np.ones(3)
        hour = rng.random()
        if hour < domain.night:
            light, warm = rng.uniform(0.1, 0.25), np.array([0.85, 0.9, 1.1])
        elif hour < 2 * domain.night:
            light, warm = rng.uniform(0.4, 0.6), np.array([1.15, 0.95, 0.8])
        kind = rng.random()
        fog = rng.uniform(0.01, 0.03) if kind < domain.fog else 0.0
        rain = rng.uniform(0.3, 1.2) if domain.fog <= kind < 2 * domain.fog else 0.0
        return cls(float(light), float(fog), float(rain), warm)

    @property
    def is_night(self) -> bool:
        """Whether headlamps are what one sees by."""
        return self.light < 0.3

    def on_surfaces(self, colour: np.ndarray, depth: np.ndarray, camera: Camera) -> np.ndarray:
        """Colours under this light, float [H, W, 3], 0 to 1.

        Args:
            colour: by day.
            depth: metres [H, W], infinite in the sky.
            camera: its headlamps are beside it.
        """
        light = np.full(depth.shape, self.light, np.float32)
        if self.is_night:
            w = camera.size[1]
            column = (np.arange(w) + 0.5 - w / 2) / camera.focal
            near = np.minimum(depth, FARTHEST_M)
            cone = np.exp(-np.square(column[None, :] / 0.35)) * np.exp(-near / 22)
            light += np.where(np.isfinite(depth), np.float32(0.9) * cone, 0)
        return np.clip(colour * light[..., None] * self.warm.astype(np.float32), 0, 1)

    def through_air(
        self, colour: np.ndarray, depth: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Fog and rain before what is seen, float [H, W, 3]."""
        if self.fog:
            clear = np.exp(-self.fog * np.minimum(depth, 400))[..., None]
            colour = colour * clear + 0.72 * self.light * (1 - clear)
        if self.rain:
            h, w = depth.shape
            streaks = np.zeros((h, w))
            count = int(self.rain * h * w / 1000)
            streaks[rng.integers(h, size=count), rng.integers(w, size=count)] = 1
            streaks = ndimage.uniform_filter1d(streaks, max(3, h // 24), axis=0)
            colour = colour + streaks[..., None] * 1.5
        return colour


def _through_lens(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vignette, blur and noise: uint8 [H, W, 3] of float [H, W, 3]."""
    h, w = colour.shape[:2]
    y, x = np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None, :]
    colour = colour * (1 - rng.uniform(0, 0.25) * (x**2 + y**2) / 2)[..., None]
    blur = rng.uniform(0, 0.7)
    if blur > 0.25:
        colour = ndimage.gaussian_filter(colour, (blur, blur, 0))
    colour = colour * rng.uniform(0.9, 1.1) + rng.normal(0, rng.uniform(0.003, 0.02), colour.shape)
    pixels: np.ndarray = (np.clip(colour, 0, 1) * 255).astype(np.uint8)
    return pixels


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: uint8 [H, W, 3].
        objects: category and box (x1, y1, x2, y2, half open) of all that is in sight.
        drivable: bool [H, W].
        lane: bool [H, W].
    """

    image: np.ndarray
    objects: tuple[tuple[str, tuple[int, int, int, int]], ...]
    drivable: np.ndarray
    lane: np.ndarray

    def sample(self) -> Sample:
        """What is known of it, as every loader says it."""
        boxes = [box for category, box in self.objects if category in VEHICLES]
        stacked = np.array(boxes, np.float32).reshape(-1, 4)
        classes = np.zeros(len(boxes), np.int64)
        return Sample(self.image, stacked, classes, drivable=self.drivable, lane=self.lane)


def draw_scene(seed: int, domain: Domain, size: tuple[int, int]) -> Scene:
    """A scene, the same for the same seed, domain and size.

    Args:
        seed: decides everything that is drawn.
        domain: where from.
        size: height and width in pixels.
    """
    rng = np.random.default_rng([seed, *domain.name.encode()])
    large = (size[0] * _SCALE, size[1] * _SCALE)
    camera, road = Camera.drawn(domain, large, rng), Road.drawn(domain, rng)
    weather = _Weather.drawn(domain, rng)
    canvas = _draw_surroundings(camera, road, rng)
    ground = camera.ground()
    painted = paint_road(road, camera, ground, domain, _SCALE, rng)
    depth = ground[1]
    colour = np.asarray(canvas, np.float32) / 255
    colour[painted.there] = painted.colour[painted.there]
    colour = weather.on_surfaces(colour, depth, camera)
    canvas = Image.fromarray((colour * 255).astype(np.uint8))
    owner = np.zeros(large, np.int16)
    whole: list[tuple[str, int]] = []
    for vehicle in draw_traffic(road, domain, rng):
        covered = render(vehicle, canvas, camera, min(1.0, weather.light + 0.1))
        if covered is not None:
            whole.append((vehicle.category, int(covered.sum())))
            owner[covered] = len(whole)
            depth[covered] = vehicle.z
    colour = weather.through_air(np.asarray(canvas, np.float32) / 255, depth, rng)
    shrunk = _mean(colour)
    free = owner == 0
    return Scene(
        _through_lens(shrunk, rng),
        tuple(_objects(owner, whole)),
        _most(painted.drivable & free),
        _most(painted.lane & free),
    )


def scene_set(count: int, domain: Domain, size: tuple[int, int], first_seed: int) -> DrivingSet:
    """Scenes that are drawn when they are read.

    Args:
        count: how many.
        domain: where from.
        size: height and width.
        first_seed: of the first; the others follow.
    """
    names = [f"{domain.name}-{first_seed + place:07d}" for place in range(count)]

    def read(place: int) -> Sample:
        return draw_scene(first_seed + place, domain, size).sample()

    return DrivingSet(f"scenes of domain {domain.name}", names, read, Complaints())


def _mean(values: np.ndarray) -> np.ndarray:
    """Means over the pixels of the larger picture that one pixel is made of, float32."""
    parts = [values[i::_SCALE, j::_SCALE] for i in range(_SCALE) for j in range(_SCALE)]
    total = np.zeros(parts[0].shape, np.float32)
    for part in parts:
        total += part
    return total / len(parts)


def _most(mask: np.ndarray) -> np.ndarray:
    """Bool [H, W]: pixels of which at least half is covered in the larger picture."""
    covered: np.ndarray = _mean(mask) >= 0.5
    return covered


def _objects(owner: np.ndarray, whole: list[tuple[str, int]]) -> Any:
    """Boxes of the pixels that are seen of each, where enough of them are."""
    for number, (category, pixels) in enumerate(whole, 1):
        rows, columns = np.nonzero(owner == number)
        if len(rows) < _LEAST_VISIBLE * pixels:
            continue
        x1, y1 = int(columns.min()) // _SCALE, int(rows.min()) // _SCALE
        x2, y2 = int(columns.max()) // _SCALE + 1, int(rows.max()) // _SCALE + 1
        if min(x2 - x1, y2 - y1) >= _LEAST_SIDE:
            yield category, (x1, y1, x2, y2)
