"""Scores of masks: what is counted in every image is added up, and divided once over the set.

A mean of each batch's own ratio would change with the size of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class MaskCounts:
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
    def of(cls, truth: np.ndarray, found: np.ndarray) -> MaskCounts:
        """Counts of one image, bool [H, W] both."""
        hit, wrong = int((truth & found).sum()), int((~truth & found).sum())
        missed = int((truth & ~found).sum())
        return cls(hit, wrong, missed, truth.size - hit - wrong - missed)

    def __add__(self, other: MaskCounts) -> MaskCounts:
        return MaskCounts(
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
class NearCounts:
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
    ) -> tuple[NearCounts, ...]:
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

    def __add__(self, other: NearCounts) -> NearCounts:
        return NearCounts(
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
