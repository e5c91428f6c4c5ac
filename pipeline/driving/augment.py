"""A sample as a step of training sees it: laid into the input, and changed by chance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from pipeline.driving.letterbox import PAD, Letterbox
from pipeline.driving.loss import Batch
from pipeline.driving.mosaic import mosaic
from pipeline.driving.sample import DrivingSet, Sample

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


def _random_homography(
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


def _warp(sample: Sample, homography: np.ndarray) -> Sample:
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


@dataclass(frozen=True)
class Augmentation:
    """What chance may do to a sample.

    Attributes:
        mosaic: probability that it becomes a quarter of four.
        perspective: how far its view may change; None leaves it.
        flip: probability that left and right change places; where traffic keeps to one side, this
            shows a road of the other.
        colour: how far brightness, contrast and each colour may go, about 1.
    """

    mosaic: float = 0.0
    perspective: Amounts | None = None
    flip: float = 0.0
    colour: float = 0.0

    def drawn(
        self, data: DrivingSet, place: int, size: tuple[int, int], rng: np.random.Generator
    ) -> Sample:
        """A sample of a set, laid into the input and changed."""
        sample = laid(data.read(place), size)
        if self.mosaic and rng.random() < self.mosaic:
            others = rng.integers(len(data), size=3)
            sample = mosaic([sample, *(laid(data.read(int(o)), size) for o in others)], rng)
        if self.perspective is not None:
            sample = _warp(sample, _random_homography(size, self.perspective, rng))
        if self.flip and rng.random() < self.flip:
            sample = flipped(sample)
        return sample if not self.colour else _coloured(sample, self.colour, rng)


def laid(sample: Sample, size: tuple[int, int]) -> Sample:
    """A sample laid into the network's input."""
    place = Letterbox.of((sample.image.shape[0], sample.image.shape[1]), size)
    return replace(
        sample,
        image=place.image(sample.image),
        boxes=None if sample.boxes is None else place.boxes(sample.boxes),
        ignored=place.boxes(sample.ignored),
        drivable=None if sample.drivable is None else place.mask(sample.drivable),
        lane=None if sample.lane is None else place.mask(sample.lane),
    )


def flipped(sample: Sample) -> Sample:
    """A sample with left and right exchanged; twice is the sample."""
    width = sample.image.shape[1]

    def turned(boxes: np.ndarray) -> np.ndarray:
        return np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)

    return replace(
        sample,
        image=sample.image[:, ::-1],
        boxes=None if sample.boxes is None else turned(sample.boxes),
        ignored=turned(sample.ignored),
        drivable=None if sample.drivable is None else sample.drivable[:, ::-1],
        lane=None if sample.lane is None else sample.lane[:, ::-1],
    )


def _coloured(sample: Sample, amount: float, rng: np.random.Generator) -> Sample:
    """Brightness, contrast and the balance of colours changed."""
    contrast, *balance = rng.uniform(1 - amount, 1 + amount, 4)
    pixels = sample.image.astype(np.float32)
    middle = pixels.mean()
    changed = ((pixels - middle) * contrast + middle) * np.array(balance, np.float32)
    return replace(sample, image=np.clip(changed, 0, 255).astype(np.uint8))


def batch_of(samples: list[Sample]) -> Batch:
    """The samples of a step as tensors; of kinds that are not known, zeros that do not count."""
    h, w = samples[0].image.shape[:2]
    empty = np.zeros((h, w), bool)
    found = [sample.boxes if sample.boxes is not None else np.zeros((0, 4)) for sample in samples]
    known = [[s.boxes is not None, s.drivable is not None, s.lane is not None] for s in samples]
    pixels = np.stack([sample.image for sample in samples])

    def masks(name: str) -> torch.Tensor:
        own = [getattr(sample, name) for sample in samples]
        return torch.from_numpy(np.stack([empty if m is None else m for m in own])).float()

    counts = torch.tensor([len(boxes) for boxes in found])
    return Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255,
        torch.from_numpy(np.concatenate(found).astype(np.float32)),
        torch.repeat_interleave(torch.arange(len(samples)), counts),
        torch.from_numpy(np.concatenate([s.classes for s in samples])),
        masks("drivable"),
        masks("lane"),
        torch.tensor(known),
    )
