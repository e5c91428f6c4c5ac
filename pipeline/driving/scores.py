"""Scores of a set, from what was seen in each image and what is known of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.driving.average_precision import ScoredImage, average_precision, matched
from pipeline.driving.mask_scores import MaskCounts, NearCounts
from pipeline.driving.perceive import Perception
from pipeline.driving.sample import NO_BOXES, Sample

_RADII = (1, 2, 5)
_SEEN = 0.25  # a box of this score is one that a user sees


@dataclass(frozen=True)
class ImageScore:
    """What one image adds to the scores; None of a kind that is not known of it.

    Attributes:
        boxes: found and true.
        drivable: pixels.
        lane: pixels.
        lane_near: pixels near one another, for each of the radii 1, 2 and 5.
    """

    boxes: ScoredImage | None
    drivable: MaskCounts | None
    lane: MaskCounts | None
    lane_near: tuple[NearCounts, ...]

    @classmethod
    def of(cls, seen: Perception, sample: Sample) -> ImageScore:
        """Compare what was seen in an image with what is known of it."""
        boxes = None
        near: tuple[NearCounts, ...] = ()
        if sample.boxes is not None:
            boxes = ScoredImage(seen.boxes, seen.scores, sample.boxes, sample.ignored)
        drivable = lane = None
        if sample.drivable is not None:
            drivable = MaskCounts.of(sample.drivable, seen.drivable)
        if sample.lane is not None:
            lane = MaskCounts.of(sample.lane, seen.lane)
            near = NearCounts.of(sample.lane, seen.lane, _RADII)
        return cls(boxes, drivable, lane, near)


def scores_of(images: Sequence[ImageScore]) -> dict[str, float | None]:
    """Scores of a set in [0, 1]; None where there is nothing to score.

    `ap50` is COCO's over 101 recalls, of vehicles as one class; `recall50` the part of the true
    boxes that a box with a score of 0.25 or more finds; IoU and recall of masks are by pixel; `f1`,
    `f2` and `f5` count a lane pixel as found where one lies within so many pixels.
    """
    boxes = [image.boxes for image in images if image.boxes is not None]
    precision = average_precision(boxes)
    drivable = sum((i.drivable for i in images if i.drivable is not None), MaskCounts())
    lane = sum((i.lane for i in images if i.lane is not None), MaskCounts())
    scores = {
        "ap50": None if precision is None else float(precision[0]),
        "recall50": _box_recall(boxes),
        "drivable_miou": drivable.mean_iou,
        "drivable_iou": drivable.iou,
        "lane_iou": lane.iou,
        "lane_recall": lane.recall,
        "lane_balanced_accuracy": lane.balanced_accuracy,
    }
    with_lanes = [image.lane_near for image in images if image.lane_near]
    for place, radius in enumerate(_RADII):
        near = sum((counts[place] for counts in with_lanes), NearCounts())
        scores[f"lane_f{radius}"] = near.f if near.truth or near.found else None
    return scores


def standard_errors(
    images: Sequence[ImageScore], names: Sequence[str], *, draws: int = 100, seed: int = 0
) -> dict[str, float | None]:
    """Standard errors of scores, by drawing images anew with replacement (the bootstrap).

    Args:
        images: the set.
        names: of scores.
        draws: how many sets are drawn.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    drawn = [
        scores_of([images[place] for place in generator.integers(len(images), size=len(images))])
        for _ in range(draws)
    ]
    values = {name: [value for d in drawn if (value := d[name]) is not None] for name in names}
    return {name: float(np.std(v, ddof=1)) if len(v) > 1 else None for name, v in values.items()}


def _box_recall(images: Sequence[ScoredImage]) -> float | None:
    seen = [
        ScoredImage(i.boxes[i.scores >= _SEEN], i.scores[i.scores >= _SEEN], i.truth, NO_BOXES)
        for i in images
    ]
    truths = sum(len(image.truth) for image in seen)
    if not truths:
        return None
    return sum(int((matched(image, 0.5) == 1).sum()) for image in seen) / truths
