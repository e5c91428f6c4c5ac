"""A random view of the same scene: rotated, scaled, sheared, moved, and in another perspective."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from pipeline.driving.letterbox import PAD
from pipeline.driving.sample import Sample

_LEAST_SIDE = 3.0  # pixels of a box that is left
_LEAST_PART = 0.2  # of its area that is still in the picture


@dataclass(frozen=True)
class Amounts:
    """How far each may go, either way.

    Attributes:
        degrees: of rotation.
        shift: of the picture's sides.
        scale: about 1.
        shear: degrees.
        perspective: of the projective row, for pixels.
    """

    degrees: float = 5.0
    shift: float = 0.1
    scale: float = 0.25
    shear: float = 2.0
    perspective: float = 0.0002


def random_homography(
    size: tuple[int, int], amounts: Amounts, rng: np.random.Generator
) -> np.ndarray:
    """float64 [3, 3] that takes pixels (column, row, 1) to pixels, about the picture's middle.

    Args:
        size: height and width.
        amounts: how far each part may go.
        rng: of the draw.
    """
    h, w = size
    to_middle, back = np.eye(3), np.eye(3)
    to_middle[:2, 2], back[:2, 2] = (-w / 2, -h / 2), (w / 2, h / 2)
    tilt, turn, shear = np.eye(3), np.eye(3), np.eye(3)
    tilt[2, :2] = rng.uniform(-amounts.perspective, amounts.perspective, 2)
    angle = np.deg2rad(rng.uniform(-amounts.degrees, amounts.degrees))
    scale = rng.uniform(1 - amounts.scale, 1 + amounts.scale)
    turn[:2, :2] = scale * np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    )
    shear[0, 1], shear[1, 0] = np.tan(np.deg2rad(rng.uniform(-amounts.shear, amounts.shear, 2)))
    move = np.eye(3)
    move[:2, 2] = rng.uniform(-amounts.shift, amounts.shift, 2) * (w, h)
    whole: np.ndarray = back @ move @ shear @ turn @ tilt @ to_middle
    return whole


def warp(sample: Sample, homography: np.ndarray) -> Sample:
    """A sample under a homography, of the same size; what leaves the picture is cut off.

    Boxes become those around their four warped corners, and go where too little of them is left.
    """
    inverse = np.linalg.inv(homography)
    inverse /= inverse[2, 2]
    boxes, kept = sample.boxes, np.zeros(0, np.int64)
    if boxes is not None:
        boxes, kept = _warp_boxes(boxes, homography, sample.image.shape[:2])
    return replace(
        sample,
        image=_warp_pixels(sample.image, inverse, PAD, Image.Resampling.BILINEAR),
        boxes=boxes,
        classes=sample.classes[kept],
        ignored=_warp_boxes(sample.ignored, homography, sample.image.shape[:2])[0],
        drivable=_warp_mask(sample.drivable, inverse),
        lane=_warp_mask(sample.lane, inverse),
    )


def _warp_mask(mask: np.ndarray | None, inverse: np.ndarray) -> np.ndarray | None:
    if mask is None:
        return None
    warped = _warp_pixels(mask.astype(np.uint8), inverse, 0, Image.Resampling.NEAREST)
    return warped.astype(bool)


def _warp_pixels(
    pixels: np.ndarray, inverse: np.ndarray, fill: int, filter_: Image.Resampling
) -> np.ndarray:
    """uint8 of the same shape. Pillow asks where the middle of each comes from."""
    image = Image.fromarray(pixels)
    colour = (fill,) * 3 if image.mode == "RGB" else fill
    warped = image.transform(
        image.size,
        Image.Transform.PERSPECTIVE,
        tuple(float(c) for c in inverse.ravel()[:8]),
        filter_,
        fillcolor=colour,
    )
    return np.asarray(warped)


def _warp_boxes(
    boxes: np.ndarray, homography: np.ndarray, size: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [K, 4] that are left, and their places."""
    h, w = size
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2).astype(np.float64)
    ones = np.ones((*corners.shape[:2], 1))
    mapped = np.concatenate((corners, ones), axis=2) @ homography.T
    flat = mapped[..., :2] / np.maximum(mapped[..., 2:], 1e-6)
    whole = np.concatenate((flat.min(axis=1), flat.max(axis=1)), axis=1)
    cut = np.clip(whole, 0, [w, h, w, h])
    sides, before = cut[:, 2:] - cut[:, :2], (whole[:, 2:] - whole[:, :2]).prod(axis=1)
    left = (sides.min(axis=1, initial=np.inf) >= _LEAST_SIDE) & (
        sides.prod(axis=1) >= _LEAST_PART * before
    )
    ahead = (mapped[..., 2] > 1e-6).all(axis=1)
    kept = np.flatnonzero(left & ahead)
    return cut[kept].astype(np.float32), kept
