"""A sample as a step of training sees it: laid into the input, and changed by chance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.driving.letterbox import Letterbox
from pipeline.driving.loss import Batch
from pipeline.driving.mosaic import mosaic
from pipeline.driving.perspective import Amounts, random_homography, warp
from pipeline.driving.sample import DrivingSet, Sample


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
            sample = warp(sample, random_homography(size, self.perspective, rng))
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
