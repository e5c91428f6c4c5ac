"""Scenes as a folder in BDD100K's own form: one loader reads them and the real set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.artefact import write_json
from pipeline.driving.scenes.scene import Scene

_QUALITY = 92  # of JPEG
_LANE, _BACKGROUND = 6, 255  # single white, as BDD100K numbers it
_DIRECT, _NO_AREA = 0, 2


def write_scenes(folder: Path, split: str, scenes: Iterable[tuple[str, Scene]]) -> None:
    """Write images, Scalabel's boxes and both masks.

    Args:
        folder: to write into.
        split: `train` or `val`.
        scenes: with the names that their files get.
    """
    images = folder / "images/100k" / split
    drivable, lane = (folder / f"labels/{kind}/masks" / split for kind in ("drivable", "lane"))
    boxes = folder / "labels/det_20"
    for made in (images, drivable, lane, boxes):
        made.mkdir(parents=True, exist_ok=True)
    frames = []
    for name, scene in scenes:
        Image.fromarray(scene.image).save(images / f"{name}.jpg", quality=_QUALITY)
        area = np.where(scene.drivable, _DIRECT, _NO_AREA).astype(np.uint8)
        Image.fromarray(area).save(drivable / f"{name}.png")
        line = np.where(scene.lane, _LANE, _BACKGROUND).astype(np.uint8)
        Image.fromarray(line).save(lane / f"{name}.png")
        frames.append(_frame(name, scene))
    write_json(boxes / f"det_{split}.json", frames)


def _frame(name: str, scene: Scene) -> dict[str, Any]:
    """Scalabel's frame; its boxes name the last pixel that is inside."""
    labels = [
        {
            "id": str(number),
            "category": category,
            "box2d": {"x1": x1, "y1": y1, "x2": x2 - 1, "y2": y2 - 1},
        }
        for number, (category, (x1, y1, x2, y2)) in enumerate(scene.objects)
    ]
    return {"name": f"{name}.jpg", "labels": labels}
