"""Average precision of boxes over a set, as COCO defines it (1405.0312), one class at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.driving.boxes import pairwise_iou

_RECALLS = np.linspace(0, 1, 101)
_MOST_BOXES = 100  # of an image


@dataclass(frozen=True)
class ScoredImage:
    """Boxes of one class in one image.

    Attributes:
        boxes: float [N, 4] that were found, half open.
        scores: float [N].
        truth: float [M, 4].
        ignored: float [K, 4], crowds: what falls on them is neither right nor wrong.
    """

    boxes: np.ndarray
    scores: np.ndarray
    truth: np.ndarray
    ignored: np.ndarray


def average_precision(
    images: Sequence[ScoredImage], thresholds: Sequence[float] = (0.5,)
) -> np.ndarray | None:
    """Mean precision at 101 recalls, for each threshold of IoU.

    Boxes of the whole set are ranked together, so that it is no mean over images or batches.

    Args:
        images: the set.
        thresholds: of IoU above which a box is right.

    Returns:
        float64 [thresholds], in [0, 1]; None where the set holds no true box: it is undefined.
    """
    truths = sum(len(image.truth) for image in images)
    if not truths:
        return None
    ranked = [_ranked(image) for image in images]
    scores = np.concatenate([image.scores for image in ranked])
    order = np.argsort(-scores, kind="stable")
    found = []
    for threshold in thresholds:
        verdicts = np.concatenate([matched(image, threshold) for image in ranked])[order]
        found.append(_area(verdicts[verdicts >= 0] == 1, truths))
    return np.array(found)


def _ranked(image: ScoredImage) -> ScoredImage:
    order = np.argsort(-image.scores, kind="stable")[:_MOST_BOXES]
    return ScoredImage(image.boxes[order], image.scores[order], image.truth, image.ignored)


def matched(image: ScoredImage, threshold: float) -> np.ndarray:
    """Say of each box whether it finds a truth of its own.

    Args:
        image: with its boxes ranked.
        threshold: of IoU.

    Returns:
        int64 [N]: 1 if it does, 0 if not, -1 on a crowd, where it does not count.
    """
    crowd = np.arange(len(image.truth) + len(image.ignored)) >= len(image.truth)
    everything = np.concatenate((image.truth.reshape(-1, 4), image.ignored.reshape(-1, 4)))
    overlap = pairwise_iou(image.boxes, everything, crowd)
    free = np.ones(len(everything), bool)
    verdicts = np.zeros(len(image.boxes), np.int64)
    for place, row in enumerate(overlap):
        # Of equally good ones COCO takes the last; a crowd only where no truth is left.
        for group in (free & ~crowd, crowd):
            usable = np.flatnonzero(group & (row >= min(threshold, 1 - 1e-10)))
            if len(usable):
                best = usable[len(usable) - 1 - np.argmax(row[usable][::-1])]
                verdicts[place] = -1 if crowd[best] else 1
                free[best] = False
                break
    return verdicts


def _area(right: np.ndarray, truths: int) -> float:
    """Mean over recalls of the best precision at that recall or a higher one."""
    hits = np.cumsum(right)
    recall = hits / truths
    precision = hits / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(best, 0.0)[places].mean())
