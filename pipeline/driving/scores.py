"""Scores of a set: boxes by COCO's average precision (1405.0312), masks by counts.

What is counted in every image is added up, and divided once over the set. A mean of each
batch's own ratio would change with the size of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage

from pipeline.driving.boxes import pairwise_iou
from pipeline.driving.perceive import Perception
from pipeline.driving.sample import NO_BOXES, Sample

_RECALLS = np.linspace(0, 1, 101)
_MOST_BOXES = 100  # of an image
_RADII = (1, 2, 5)
_SEEN = 0.25  # a box of this score is one that a user sees


@dataclass(frozen=True)
class _ScoredImage:
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

    @cached_property
    def ranked(self) -> _ScoredImage:
        """The best boxes, the best first."""
        order = np.argsort(-self.scores, kind="stable")[:_MOST_BOXES]
        return _ScoredImage(self.boxes[order], self.scores[order], self.truth, self.ignored)

    @cached_property
    def _verdicts(self) -> dict[float, np.ndarray]:
        return {}

    def verdicts(self, threshold: float) -> np.ndarray:
        """As `_matched`, which is asked once: the bootstrap draws an image a hundred times."""
        if threshold not in self._verdicts:
            self._verdicts[threshold] = _matched(self, threshold)
        return self._verdicts[threshold]

    @cached_property
    def recalled(self) -> int:
        """True boxes that a box which a user sees finds."""
        seen = self.scores >= _SEEN
        image = _ScoredImage(self.boxes[seen], self.scores[seen], self.truth, NO_BOXES)
        return int((_matched(image, 0.5) == 1).sum())


def _average_precision(
    images: Sequence[_ScoredImage], thresholds: Sequence[float] = (0.5,)
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
    ranked = [image.ranked for image in images]
    scores = np.concatenate([image.scores for image in ranked])
    order = np.argsort(-scores, kind="stable")
    found = []
    for threshold in thresholds:
        verdicts = np.concatenate([image.verdicts(threshold) for image in ranked])[order]
        found.append(_area(verdicts[verdicts >= 0] == 1, truths))
    return np.array(found)


def _matched(image: _ScoredImage, threshold: float) -> np.ndarray:
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


@dataclass(frozen=True)
class _MaskCounts:
    """Pixels of a binary mask, by what they are and what was said; may be added.

    Attributes:
        hit: of the class, and found.
        wrong: not of it, and found.
        missed: of it, and not found.
        rest: neither.
    """

    hit: int = 0
    wrong: int = 0
    missed: int = 0
    rest: int = 0

    @classmethod
    def of(cls, truth: np.ndarray, found: np.ndarray) -> _MaskCounts:
        """Counts of one image, bool [H, W] both."""
        hit, wrong = int((truth & found).sum()), int((~truth & found).sum())
        missed = int((truth & ~found).sum())
        return cls(hit, wrong, missed, truth.size - hit - wrong - missed)

    def __add__(self, other: _MaskCounts) -> _MaskCounts:
        return _MaskCounts(
            self.hit + other.hit,
            self.wrong + other.wrong,
            self.missed + other.missed,
            self.rest + other.rest,
        )

    @property
    def iou(self) -> float | None:
        """Intersection over union of the class; None where it is neither there nor found."""
        return _ratio(self.hit, self.hit + self.wrong + self.missed)

    @property
    def mean_iou(self) -> float | None:
        """Mean of the class's IoU and of the background's."""
        behind = _ratio(self.rest, self.rest + self.wrong + self.missed)
        return None if self.iou is None or behind is None else (self.iou + behind) / 2

    @property
    def recall(self) -> float | None:
        """Part of the class that was found: what YOLOP calls lane accuracy."""
        return _ratio(self.hit, self.hit + self.missed)

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean recall of class and background: what HybridNets calls lane accuracy."""
        behind = _ratio(self.rest, self.rest + self.wrong)
        return None if self.recall is None or behind is None else (self.recall + behind) / 2


@dataclass(frozen=True)
class _NearCounts:
    """Pixels of thin masks that have one of the other mask within a distance; may be added.

    Attributes:
        near_found: of what was found, those near the truth.
        found: all that was found.
        near_truth: of the truth, those near what was found.
        truth: all of the truth.
    """

    near_found: int = 0
    found: int = 0
    near_truth: int = 0
    truth: int = 0

    @classmethod
    def of(
        cls, truth: np.ndarray, found: np.ndarray, radii: Sequence[int]
    ) -> tuple[_NearCounts, ...]:
        """Counts of one image for each radius, as BDD100K's lane evaluation takes them.

        Args:
            truth: bool [H, W].
            found: bool [H, W].
            radii: pixels, in a straight line.
        """
        to_truth, to_found = _distances(truth)[found], _distances(found)[truth]
        return tuple(
            cls(
                int((to_truth <= r).sum()), len(to_truth), int((to_found <= r).sum()), len(to_found)
            )
            for r in radii
        )

    def __add__(self, other: _NearCounts) -> _NearCounts:
        return _NearCounts(
            self.near_found + other.near_found,
            self.found + other.found,
            self.near_truth + other.near_truth,
            self.truth + other.truth,
        )

    @property
    def f(self) -> float:
        """Harmonic mean of precision and recall; 1 where there is nothing and nothing is found."""
        if not self.found and not self.truth:
            return 1.0
        precision = self.near_found / self.found if self.found else 1.0
        recall = self.near_truth / self.truth if self.truth else 1.0
        both = precision + recall
        return 2 * precision * recall / both if both else 0.0


def _distances(mask: np.ndarray) -> np.ndarray:
    """Of every pixel to the nearest one that is set, infinite where none is."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    away: np.ndarray = ndimage.distance_transform_edt(~mask)
    return away


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class ImageScore:
    """What one image adds to the scores; None of a kind that is not known of it.

    Attributes:
        boxes: found and true.
        drivable: pixels.
        lane: pixels.
        lane_near: pixels near one another, for each of the radii 1, 2 and 5.
    """

    boxes: _ScoredImage | None
    drivable: _MaskCounts | None
    lane: _MaskCounts | None
    lane_near: tuple[_NearCounts, ...]

    @classmethod
    def of(cls, seen: Perception, sample: Sample) -> ImageScore:
        """Compare what was seen in an image with what is known of it."""
        boxes = None
        near: tuple[_NearCounts, ...] = ()
        if sample.boxes is not None:
            boxes = _ScoredImage(seen.boxes, seen.scores, sample.boxes, sample.ignored)
        drivable = lane = None
        if sample.drivable is not None:
            drivable = _MaskCounts.of(sample.drivable, seen.drivable)
        if sample.lane is not None:
            lane = _MaskCounts.of(sample.lane, seen.lane)
            near = _NearCounts.of(sample.lane, seen.lane, _RADII)
        return cls(boxes, drivable, lane, near)


def scores_of(images: Sequence[ImageScore]) -> dict[str, float | None]:
    """Scores of a set in [0, 1]; None where there is nothing to score.

    `ap50` is COCO's over 101 recalls, of vehicles as one class; `recall50` the part of the true
    boxes that a box with a score of 0.25 or more finds; IoU and recall of masks are by pixel; `f1`,
    `f2` and `f5` count a lane pixel as found where one lies within so many pixels.
    """
    boxes = [image.boxes for image in images if image.boxes is not None]
    precision = _average_precision(boxes)
    drivable = sum((i.drivable for i in images if i.drivable is not None), _MaskCounts())
    lane = sum((i.lane for i in images if i.lane is not None), _MaskCounts())
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
        near = sum((counts[place] for counts in with_lanes), _NearCounts())
        scores[f"lane_f{radius}"] = near.f if near.truth or near.found else None
    return scores


def agreement(seen: Sequence[Perception], others: Sequence[Perception]) -> dict[str, float | None]:
    """How alike what was seen in the same images by two is, in [0, 1]; None where neither saw any.

    `boxes_f` is twice the pairs of boxes that overlap by half, over all boxes; the others are
    intersection over union of the masks, which no background can make look good.
    """
    hits = count = 0
    drivable = lane = _MaskCounts()
    for own, other in zip(seen, others, strict=True):
        a, b = (x.boxes[x.scores >= _SEEN] for x in (own, other))
        image = _ScoredImage(a, own.scores[own.scores >= _SEEN], b, NO_BOXES)
        hits += int((_matched(image, 0.5) == 1).sum())
        count += len(a) + len(b)
        drivable += _MaskCounts.of(other.drivable, own.drivable)
        lane += _MaskCounts.of(other.lane, own.lane)
    return {
        "boxes_f": _ratio(2 * hits, count),
        "drivable_iou": drivable.iou,
        "lane_iou": lane.iou,
    }


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


def _box_recall(images: Sequence[_ScoredImage]) -> float | None:
    truths = sum(len(image.truth) for image in images)
    return sum(image.recalled for image in images) / truths if truths else None
