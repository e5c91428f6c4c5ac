"""What is around the road: sky, ground, walls, trees, poles and signs."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from pipeline.driving.scenes.camera import Camera
from pipeline.driving.scenes.road import Road


def draw_surroundings(camera: Camera, road: Road, rng: np.random.Generator) -> Image.Image:
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
