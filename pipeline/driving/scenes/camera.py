"""A pinhole camera above a flat road: from pixels to the road and from space to pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.driving.scenes.domain import Domain

FARTHEST_M = 160.0


@dataclass(frozen=True)
class Camera:
    """X is to the right, Y up from the road, Z ahead, in metres; pixels from the upper left corner.

    Attributes:
        size: rows and columns.
        focal: in pixels.
        height_m: above the road.
        horizon: its row in the middle of the image.
        roll: radians, clockwise.
    """

    size: tuple[int, int]
    focal: float
    height_m: float
    horizon: float
    roll: float

    @classmethod
    def drawn(cls, domain: Domain, size: tuple[int, int], rng: np.random.Generator) -> Camera:
        """A camera of a domain."""
        return cls(
            size,
            float(size[1] * rng.uniform(*domain.focal)),
            float(rng.uniform(*domain.camera_height_m)),
            float(size[0] * rng.uniform(*domain.horizon)),
            float(rng.normal(0, 0.008)),
        )

    def ground(self) -> tuple[np.ndarray, np.ndarray]:
        """X and Z of the road behind every pixel, float32 [H, W]; Z is infinite above it."""
        h, w = self.size
        column = np.arange(w, dtype=np.float32)[None, :] + (0.5 - w / 2)
        row = np.arange(h, dtype=np.float32)[:, None] + float(0.5 - self.horizon)
        cos, sin = float(np.cos(self.roll)), float(np.sin(self.roll))
        x, y = cos * column + sin * row, cos * row - sin * column
        z = float(self.focal * self.height_m) / np.maximum(y, np.float32(1e-6))
        x *= z / self.focal
        z[z > FARTHEST_M] = np.inf
        return x, z

    def project(self, points: np.ndarray) -> np.ndarray:
        """Columns and rows, float [N, 2], of points [N, 3] ahead of the camera."""
        x = self.focal * points[:, 0] / points[:, 2]
        y = self.focal * (self.height_m - points[:, 1]) / points[:, 2]
        cos, sin = np.cos(self.roll), np.sin(self.roll)
        return np.stack(
            (cos * x - sin * y + self.size[1] / 2, sin * x + cos * y + self.horizon), axis=1
        )
