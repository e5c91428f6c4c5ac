"""Boxes: how they lie to one another, and how the network's numbers become boxes.

A box is x1, y1, x2, y2 in pixels, half open: its width is x2 - x1.
"""

from __future__ import annotations

import math

import numpy as np
import torch


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


def complete_iou(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU of pairs of boxes, and CIoU, which also minds distance and aspect ratio (1911.08287).

    Args:
        a: float [N, 4], as they are predicted.
        b: float [N, 4], as they should be.

    Returns:
        IoU and CIoU, float [N] each.
    """
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    eps = 1e-7
    iou = shared / (size_a.prod(dim=1) + size_b.prod(dim=1) - shared + eps)
    around = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    apart = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]).square().sum(dim=1) / 4
    angle_a, angle_b = (torch.atan(s[:, 0] / (s[:, 1] + eps)) for s in (size_a, size_b))
    v = (angle_a - angle_b).square() * (4 / math.pi**2)
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return iou, iou - apart / (around.square().sum(dim=1) + eps) - alpha * v


def place_boxes(raw: torch.Tensor, cells: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes out of four raw numbers each: centre 2 s - 0.5 + cell, sides (2 s)^2 anchor.

    Args:
        raw: float [N, 4], before the sigmoid s.
        cells: float [N, 2], column and row.
        anchors: float [N, 2], sides in cells.

    Returns:
        float [N, 4], x1, y1, x2, y2 in cells.
    """
    squashed = 2 * raw.sigmoid()
    centre = squashed[:, :2] - 0.5 + cells
    half = squashed[:, 2:].square() * anchors / 2
    return torch.cat((centre - half, centre + half), dim=1)


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
