"""One scene: its picture, and its labels cut by what stands before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.driving.frames import VEHICLES
from pipeline.driving.sample import Complaints, DrivingSet, Sample
from pipeline.driving.scenes.camera import Camera
from pipeline.driving.scenes.domain import Domain
from pipeline.driving.scenes.road import Road, paint_road
from pipeline.driving.scenes.surroundings import draw_surroundings
from pipeline.driving.scenes.vehicles import draw_traffic, render
from pipeline.driving.scenes.weather import Weather, through_lens

_SCALE = 2  # the picture is drawn so much larger, and averaged
_LEAST_SIDE = 5  # pixels, below which a vehicle is not labelled
_LEAST_VISIBLE = 0.25  # of it


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
    weather = Weather.drawn(domain, rng)
    canvas = draw_surroundings(camera, road, rng)
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
        through_lens(shrunk, rng),
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
