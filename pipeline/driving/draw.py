"""What was seen, drawn over the image: the drivable area green, lane lines red, boxes in yellow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pipeline.driving.perceive import Perception

# Of a mask that is written; as `FOLDER:drivable=1,lane=2` reads them.
DRIVABLE_ID, LANE_ID = 1, 2
_DRIVABLE, _LANE, _BOX = (40, 190, 80), (230, 40, 40), (255, 210, 0)
_COVER = 0.45  # of the image by a mask
_TEXT_ABOVE = 12  # pixels


def drawn_over(image: np.ndarray, seen: Perception, labels: Sequence[str]) -> np.ndarray:
    """The image with masks and boxes over it.

    Args:
        image: uint8 [H, W, 3].
        seen: in its pixels.
        labels: names of classes.

    Returns:
        uint8 [H, W, 3].
    """
    mixed = image.astype(np.float32)
    for mask, colour in ((seen.drivable & ~seen.lane, _DRIVABLE), (seen.lane, _LANE)):
        mixed[mask] = (1 - _COVER) * mixed[mask] + _COVER * np.array(colour, np.float32)
    picture = Image.fromarray(mixed.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for box, score, number in zip(seen.boxes, seen.scores, seen.classes, strict=True):
        x1, y1, x2, y2 = (float(side) for side in box)
        pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=_BOX)
        pen.text((x1, max(0.0, y1 - _TEXT_ABOVE)), f"{labels[number]} {score:.2f}", fill=_BOX)
    return np.asarray(picture)


def mask_ids(seen: Perception) -> np.ndarray:
    """uint8 [H, W]: LANE_ID where a lane line is, else DRIVABLE_ID in the drivable area, else 0."""
    ids = np.where(seen.drivable, DRIVABLE_ID, 0)
    return np.where(seen.lane, LANE_ID, ids).astype(np.uint8)
