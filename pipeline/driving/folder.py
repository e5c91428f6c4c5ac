"""A plain folder of images with masks of class ids, such as CamVid: `images/` and `labels/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from pipeline.driving.bdd import read_ids
from pipeline.driving.sample import NO_BOXES, Complaints, DrivingSet, Sample, images_in, open_image
from pipeline.errors import InputError

KINDS = ("vehicle", "drivable", "lane")
LAYOUT = "images/ and, of the same names, labels/ (a PNG of class ids for each image)"
_SMALLEST = 8  # pixels of a component's shorter side, below which it is no vehicle to be found


def open_folder(folder: Path, ids: Mapping[str, frozenset[int]]) -> DrivingSet:
    """Images whose labels are masks of class ids.

    Boxes are those of the connected components of `vehicle`: vehicles that hide one another are one
    box. A kind without ids is not known of these images.

    Args:
        folder: LAYOUT.
        ids: the class ids of each of KINDS.

    Raises:
        InputError: no images, none with labels, or no kind has ids.
    """
    if not ids:
        raise InputError(
            "It is not said which class ids of this folder are what.",
            where=folder,
            expected="FOLDER:drivable=3,vehicle=8, ids joined by + where a kind has several",
        )
    files = images_in(folder / "images") if (folder / "images").is_dir() else {}
    masks = {p.stem: p for p in sorted((folder / "labels").glob("*.png"))}
    complaints = Complaints()
    for stem in sorted(files.keys() - masks.keys()):
        complaints.add("images without labels", files[stem].name)
    for stem in sorted(masks.keys() - files.keys()):
        complaints.add("labels without image", masks[stem].name)
    stems = [stem for stem in files if stem in masks]
    if not stems:
        raise InputError(
            "The folder holds no labelled images.",
            where=folder,
            observed="; ".join(complaints.lines()) or "no images",
            expected=LAYOUT,
        )

    def read(place: int) -> Sample:
        return _sample(files[stems[place]], masks[stems[place]], ids)

    return DrivingSet(str(folder), [files[stem].name for stem in stems], read, complaints)


def _sample(image: Path, labels: Path, ids: Mapping[str, frozenset[int]]) -> Sample:
    pixels = open_image(image)
    codes = read_ids(labels, (pixels.shape[0], pixels.shape[1]))
    masks = {kind: np.isin(codes, list(numbers)) for kind, numbers in ids.items()}
    boxes, small = None, NO_BOXES
    if "vehicle" in masks:
        found = _components(masks["vehicle"])
        large = (found[:, 2:] - found[:, :2]).min(axis=1, initial=_SMALLEST) >= _SMALLEST
        boxes, small = found[large], found[~large]
    return Sample(
        pixels,
        boxes,
        np.zeros(0 if boxes is None else len(boxes), np.int64),
        small,
        masks.get("drivable"),
        masks.get("lane"),
    )


def _components(mask: np.ndarray) -> np.ndarray:
    """Boxes float32 [N, 4] of the connected components, diagonals included."""
    numbered, _ = ndimage.label(mask, structure=np.ones((3, 3), int))
    found = ndimage.find_objects(numbered)
    boxes = [[x.start, y.start, x.stop, y.stop] for y, x in found]
    return np.array(boxes, np.float32).reshape(-1, 4)
