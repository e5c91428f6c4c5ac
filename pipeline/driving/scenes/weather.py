"""Light, air and lens: night with headlamps, dusk, fog by depth, rain, and what a sensor adds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from pipeline.driving.scenes.camera import FARTHEST_M, Camera
from pipeline.driving.scenes.domain import Domain


@dataclass(frozen=True)
class Weather:
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
    def drawn(cls, domain: Domain, rng: np.random.Generator) -> Weather:
        """Weather of a domain."""
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


def through_lens(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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
