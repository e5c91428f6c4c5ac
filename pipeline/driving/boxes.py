"""Boxes: how they lie to one another, and how the network's numbers become boxes.

A box is x1, y1, x2, y2 in pixels, half open: its width is x2 - x1.
"""

from __future__ import annotations

import numpy as np


def pairwise_iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union of every box with every other.

    Args:
        a: float [N, 4].
        b: float [M, 4].
        crowd: bool [M]; over such a box the union is the area of `a` alone, as COCO has it.

    Returns:
        float64 [N, M]; 0 for boxes without area.
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(axis=-1) for x in (a, b))
    union = area_a[:, None] + area_b[None, :] - shared
    if crowd is not None:
        union = np.where(crowd[None, :], area_a[:, None], union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def suppress(boxes: np.ndarray, scores: np.ndarray, most_iou: float) -> np.ndarray:
    """Greedy non-maximum suppression.

    Args:
        boxes: float [N, 4], of one class.
        scores: float [N].
        most_iou: a box that overlaps a better one by more than this goes.

    Returns:
        Places of those that stay, int64, the best first; ties in their order.
    """
    order = np.argsort(-scores, kind="stable")
    overlap = pairwise_iou(boxes, boxes)
    kept: list[int] = []
    gone = np.zeros(len(boxes), bool)
    for place in order:
        if not gone[place]:
            kept.append(int(place))
            gone |= overlap[place] > most_iou
    return np.array(kept, dtype=np.int64)
