"""Four images in one, about a point somewhere in the middle (2004.10934)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.driving.sample import Sample

_LEAST_SIDE = 3.0
_LEAST_PART = 0.2


def mosaic(samples: Sequence[Sample], rng: np.random.Generator) -> Sample:
    """One sample out of four of equal size, each shifted by whole pixels and cut.

    A kind of label is known of it only where it is known of all four.

    Args:
        samples: four.
        rng: of the point where they meet.
    """
    h, w = samples[0].image.shape[:2]
    row, column = int(rng.uniform(0.3, 0.7) * h), int(rng.uniform(0.3, 0.7) * w)
    # Where each lies in the whole, and what of it is seen: its lower right corner is at the point
    # for the first, and so on, so that every picture shows the part that is next to the others.
    quarters = [
        (slice(0, row), slice(0, column), slice(h - row, h), slice(w - column, w)),
        (slice(0, row), slice(column, w), slice(h - row, h), slice(0, w - column)),
        (slice(row, h), slice(0, column), slice(0, h - row), slice(w - column, w)),
        (slice(row, h), slice(column, w), slice(0, h - row), slice(0, w - column)),
    ]
    image = np.empty_like(samples[0].image)
    masks = {name: np.zeros((h, w), bool) for name in ("drivable", "lane")}
    boxes, classes, ignored = [], [], []
    for sample, (to_rows, to_columns, rows, columns) in zip(samples, quarters, strict=True):
        image[to_rows, to_columns] = sample.image[rows, columns]
        for name, mask in masks.items():
            if (own := getattr(sample, name)) is not None:
                mask[to_rows, to_columns] = own[rows, columns]
        if sample.boxes is not None:
            window = (columns.start, rows.start, columns.stop, rows.stop)
            shift = (to_columns.start - columns.start, to_rows.start - rows.start)
            cut, kept = _cut(sample.boxes, window, shift)
            boxes.append(cut)
            classes.append(sample.classes[kept])
            ignored.append(_cut(sample.ignored, window, shift)[0])
    known = {name: all(getattr(s, name) is not None for s in samples) for name in masks}
    whole = len(boxes) == len(samples)
    return Sample(
        image,
        np.concatenate(boxes) if whole else None,
        np.concatenate(classes) if whole else np.zeros(0, np.int64),
        np.concatenate(ignored) if whole else np.zeros((0, 4), np.float32),
        masks["drivable"] if known["drivable"] else None,
        masks["lane"] if known["lane"] else None,
    )


def _cut(
    boxes: np.ndarray, window: tuple[int, int, int, int], shift: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [K, 4] that a window shows enough of, moved; and their places."""
    x1, y1, x2, y2 = window
    cut = np.clip(boxes, [x1, y1, x1, y1], [x2, y2, x2, y2])
    sides = cut[:, 2:] - cut[:, :2]
    before = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    large = sides.min(axis=1, initial=np.inf) >= _LEAST_SIDE
    kept = np.flatnonzero(large & (sides.prod(axis=1) >= _LEAST_PART * before))
    return (cut[kept] + np.array(shift * 2)).astype(np.float32), kept
