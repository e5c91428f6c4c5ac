"""Scores of a network on a set, a few images at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.driving.letterbox import Letterbox
from pipeline.driving.network import DrivingMaps, QyolopConfig
from pipeline.driving.perceive import Perception, perceive
from pipeline.driving.preprocess import QyolopImageProcessor
from pipeline.driving.sample import DrivingSet, Sample
from pipeline.driving.scores import ImageScore

_BATCH = 8
LEAST_SCORE = 0.01  # boxes below it hardly change an average precision


@dataclass(frozen=True)
class MapsOfBatch:
    """What a network says of a batch, in NumPy.

    Attributes:
        boxes: for each stride [B, 3 (5 + classes), h, w].
        drivable: logits [B, 1, H, W].
        lane: logits [B, 1, H, W].
    """

    boxes: tuple[np.ndarray, ...]
    drivable: np.ndarray
    lane: np.ndarray

    @classmethod
    def of(cls, maps: DrivingMaps) -> MapsOfBatch:
        """The same numbers, in float32."""
        assert maps.boxes is not None
        assert maps.drivable is not None
        assert maps.lane is not None
        drivable, lane = maps.drivable.float().cpu().numpy(), maps.lane.float().cpu().numpy()
        return cls(tuple(m.float().cpu().numpy() for m in maps.boxes), drivable, lane)

    def seen(
        self,
        row: int,
        anchors: Sequence[Sequence[Sequence[float]]],
        placed: Letterbox,
        least_score: float,
    ) -> Perception:
        """What is seen in one image of the batch, in its own pixels.

        Args:
            row: of the image.
            anchors: of the network.
            placed: how the image was laid into the network's input.
            least_score: below it there is no box.
        """
        return perceive(
            tuple(level[row] for level in self.boxes),
            self.drivable[row],
            self.lane[row],
            anchors,
            placed,
            least_score=least_score,
        )


# Pixel values, float32 [B, 3, H, W], to maps.
Network = Callable[[torch.Tensor], MapsOfBatch]


def image_scores(
    network: Network,
    config: QyolopConfig,
    processor: QyolopImageProcessor,
    data: DrivingSet,
    places: Sequence[int],
) -> list[ImageScore]:
    """Compare what a network sees with what is known, in the pixels of each image.

    Args:
        network: on whatever runtime.
        config: its anchors are asked for.
        processor: lays images into its input.
        data: the set.
        places: of the images in it.
    """
    scores = []
    for samples in _parts(data, places):
        pixels = processor([sample.image for sample in samples])["pixel_values"]
        maps = network(pixels)
        for row, sample in enumerate(samples):
            seen = maps.seen(row, config.anchors, processor.place(sample.image), LEAST_SCORE)
            scores.append(ImageScore.of(seen, sample))
    return scores


def _parts(data: DrivingSet, places: Sequence[int]) -> Iterator[list[Sample]]:
    for first in range(0, len(places), _BATCH):
        yield [data.read(place) for place in places[first : first + _BATCH]]
