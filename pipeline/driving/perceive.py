"""From the network's maps to what is on an image: boxes with scores, and masks. NumPy alone.

One decoder for every runtime: torch, ONNX Runtime and TensorRT give the same maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.driving.boxes import suppress
from pipeline.driving.letterbox import Letterbox
from pipeline.driving.network import BOX_FIELDS, STRIDES

_CANDIDATES = 1000
_MOST_BOXES = 100


@dataclass(frozen=True)
class Perception:
    """What was seen in one image, in its own pixels.

    Attributes:
        boxes: float32 [N, 4], x1, y1, x2, y2; the best first.
        scores: float32 [N].
        classes: int64 [N].
        drivable: bool [H, W].
        lane: bool [H, W].
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    drivable: np.ndarray
    lane: np.ndarray


def _sigmoid(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = 0.5 * (1 + np.tanh(0.5 * x.astype(np.float32)))
    return result


def _decode_boxes(
    maps: tuple[np.ndarray, ...], anchors: Sequence[Sequence[Sequence[float]]], least_score: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of one image, before any are suppressed.

    Args:
        maps: for each stride [3 (5 + classes), h, w], raw.
        anchors: sides in pixels.
        least_score: of objectness times class probability.

    Returns:
        boxes float32 [N, 4] in pixels of the network's input, scores [N], classes int64 [N].
    """
    boxes, scores, classes = [], [], []
    for raw, level, stride in zip(maps, anchors, STRIDES, strict=True):
        s = _sigmoid(raw).reshape(len(level), -1, *raw.shape[-2:])
        probabilities = s[:, 4:5] * s[:, BOX_FIELDS:]
        a, c, row, column = np.nonzero(probabilities > least_score)
        x, y, w, h = s[a, :4, row, column].T * 2
        half = np.square(np.stack((w, h), 1)) * np.asarray(level, np.float32)[a] / 2
        centre = np.stack((x - 0.5 + column, y - 0.5 + row), 1) * stride
        boxes.append(np.concatenate((centre - half, centre + half), 1))
        scores.append(probabilities[a, c, row, column])
        classes.append(c)
    return (
        np.concatenate(boxes).astype(np.float32),
        np.concatenate(scores).astype(np.float32),
        np.concatenate(classes).astype(np.int64),
    )


def perceive(
    maps: tuple[np.ndarray, ...],
    drivable: np.ndarray,
    lane: np.ndarray,
    anchors: Sequence[Sequence[Sequence[float]]],
    placed: Letterbox,
    *,
    least_score: float = 0.25,
    most_iou: float = 0.6,
) -> Perception:
    """What the maps of one image say, in the pixels that the image had.

    Args:
        maps: for each stride [3 (5 + classes), h, w].
        drivable: logits [1, H, W].
        lane: logits [1, H, W].
        anchors: of the network's config.
        placed: how the image was laid into the network's input.
        least_score: below it there is no box; 0.001 to score a set, 0.25 to look at.
        most_iou: of two boxes of a class that both stay.
    """
    boxes, scores, classes = _decode_boxes(maps, anchors, least_score)
    best = np.argsort(-scores, kind="stable")[:_CANDIDATES]
    boxes, scores, classes = boxes[best], scores[best], classes[best]
    kept = [np.empty(0, np.int64)]
    for number in np.unique(classes):
        of_class = np.flatnonzero(classes == number)
        kept.append(of_class[suppress(boxes[of_class], scores[of_class], most_iou)])
    places = np.concatenate(kept)
    places = places[np.argsort(-scores[places], kind="stable")][:_MOST_BOXES]
    boxes = placed.boxes_back(boxes[places])
    solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Perception(
        boxes[solid],
        scores[places][solid],
        classes[places][solid],
        placed.mask_back(drivable[0] > 0),
        placed.mask_back(lane[0] > 0),
    )
