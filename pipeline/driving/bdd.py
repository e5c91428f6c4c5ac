"""BDD100K's folders: images, labels of 2018 or of Scalabel, masks of drivable area and lanes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.driving.frames import FrameLabels, labels_of, read_frame
from pipeline.driving.sample import Complaints, DrivingSet, Sample, images_in, open_image
from pipeline.errors import InputError
from pipeline.json_file import parse_json, read_text_file
from pipeline.model.loading import explaining

_IMAGES = ("images/100k/{split}", "images/{split}")
_DRIVABLE_MASKS = ("labels/drivable/masks/{split}",)
_LANE_MASKS = ("labels/lane/masks/{split}",)
_LABELS = (
    "labels/det_20/det_{split}.json",
    "labels/drivable/polygons/drivable_{split}.json",
    "labels/lane/polygons/lane_{split}.json",
    "labels/bdd100k_labels_images_{split}.json",
)
_LABELS_OF_EACH = ("labels/100k/{split}", "labels/{split}")
# Labels of 70,000 images are one file.
_LARGEST_BYTES = 2 << 30
_BACKGROUND_BIT = 8
_CATEGORY_BITS = 7
_CROSSWISE_BIT = 32
_LANE_CATEGORIES_LEFT_OUT = (0, 4)  # crosswalk and kerb, as the masks of lanes number them
_DRIVABLE_IDS = (0, 1)  # direct and alternative; 2 is background


def is_bdd(folder: Path) -> bool:
    """Whether a folder is laid out like BDD100K."""
    return any((folder / p.partition("{")[0]).is_dir() for p in _LABELS_OF_EACH[:1]) or any(
        (folder / place).is_dir()
        for place in ("images/100k", "labels/det_20", "labels/drivable", "labels/lane")
    )


def open_bdd(folder: Path, split: str) -> DrivingSet:
    """Images of a split with whatever labels there are.

    Images without any label and labels without image are counted and named, and left out.

    Args:
        folder: of BDD100K.
        split: `train` or `val`.

    Raises:
        InputError: there are no such images, or none of them has labels.
    """
    images = _first(folder, _IMAGES, split)
    if images is None:
        raise InputError(
            "There are no images of this split.",
            where=folder,
            expected=" or ".join(place.format(split=split) for place in _IMAGES),
        )
    files = images_in(images)
    complaints = Complaints()
    frames = _frames(folder, split, complaints)
    masks = [_masks(_first(folder, places, split)) for places in (_DRIVABLE_MASKS, _LANE_MASKS)]
    labelled = frames.keys() | masks[0].keys() | masks[1].keys()
    for stem in sorted(labelled - files.keys()):
        complaints.add("labels without image", stem)
    for stem in sorted(files.keys() - labelled):
        complaints.add("images without labels", files[stem].name)
    stems = [stem for stem in files if stem in labelled]
    if not stems:
        raise InputError(
            "No image of this split has labels.",
            where=images,
            observed="; ".join(complaints.lines()) or "no images",
            expected="labels beside the images, as BDD100K names them",
        )

    def read(place: int) -> Sample:
        stem = stems[place]
        return _sample(files[stem], frames.get(stem), masks[0].get(stem), masks[1].get(stem))

    return DrivingSet(str(folder), [files[stem].name for stem in stems], read, complaints)


def _first(folder: Path, places: tuple[str, ...], split: str) -> Path | None:
    found = (folder / place.format(split=split) for place in places)
    return next((path for path in found if path.is_dir()), None)


def _masks(folder: Path | None) -> dict[str, Path]:
    return {} if folder is None else {p.stem: p for p in folder.iterdir() if p.suffix == ".png"}


def _frames(folder: Path, split: str, complaints: Complaints) -> dict[str, FrameLabels]:
    """Labels of every image, by its name without suffix; those of several files are joined."""
    labels: dict[str, list[dict[str, Any]]] = {}
    asked: dict[str, set[str]] = {}
    for file, kind, frame in _frames_of_files(folder, split):
        if not isinstance(frame, dict) or not isinstance(frame.get("name"), str):
            complaints.add("frames without a name", file.name)
            continue
        stem = Path(frame["name"]).stem
        if kind in asked.setdefault(stem, set()):
            complaints.add("frames that are there twice", stem)
            continue
        asked[stem].add(kind)
        labels.setdefault(stem, []).extend(labels_of(frame))
    # A file of boxes that lists an image says that it has none where it names none.
    return {
        stem: _asked_for(read_frame(found, stem, complaints), asked[stem])
        for stem, found in labels.items()
    }


def _asked_for(frame: FrameLabels, kinds: set[str]) -> FrameLabels:
    spoken = frame.kinds | (kinds & {"boxes", "drivable", "lane"})
    if "all" in kinds:
        spoken |= {"boxes", "drivable", "lane"}
    return FrameLabels(frame.boxes, frame.ignored, frame.areas, frame.lines, frozenset(spoken))


def _frames_of_files(folder: Path, split: str) -> Iterator[tuple[Path, str, Any]]:
    """Each frame with its file, and the kind of label that the file is of."""
    for place, kind in zip(_LABELS, ("boxes", "drivable", "lane", "all"), strict=True):
        path = folder / place.format(split=split)
        if path.is_file():
            content = parse_json(read_text_file(path, largest_bytes=_LARGEST_BYTES), path)
            frames = content.get("frames") if isinstance(content, dict) else content
            if not isinstance(frames, list):
                raise InputError("This is no list of frames.", where=path)
            for frame in frames:
                yield path, kind, frame
    of_each = _first(folder, _LABELS_OF_EACH, split)
    for path in sorted(of_each.glob("*.json")) if of_each else ():
        yield path, "all", parse_json(read_text_file(path), path)


def _sample(
    image: Path, frame: FrameLabels | None, drivable: Path | None, lane: Path | None
) -> Sample:
    pixels = open_image(image)
    shape = (pixels.shape[0], pixels.shape[1])
    kinds = frame.kinds if frame else frozenset()
    sample: dict[str, Any] = {}
    if frame is not None and "boxes" in kinds:
        h, w = shape
        boxes = np.clip(frame.boxes, 0, [w, h, w, h]).astype(np.float32)
        boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
        sample |= {"boxes": boxes, "classes": np.zeros(len(boxes), np.int64)}
        sample["ignored"] = np.clip(frame.ignored, 0, [w, h, w, h]).astype(np.float32)
    if drivable is not None:
        sample["drivable"] = np.isin(read_ids(drivable, shape), _DRIVABLE_IDS)
    elif frame is not None and "drivable" in kinds:
        sample["drivable"] = frame.drivable_mask(shape)
    if lane is not None:
        sample["lane"] = _lane_foreground(read_ids(lane, shape))
    elif frame is not None and "lane" in kinds:
        sample["lane"] = frame.lane_mask(shape)
    return Sample(pixels, **sample)


def _lane_foreground(codes: np.ndarray) -> np.ndarray:
    """Where a mask of BDD100K's lane bytes has a line that a lane is kept by.

    Args:
        codes: uint8 [H, W]: bits 0 to 2 are the category, bit 3 says background, 4 the style,
            5 that it lies across the road, as a stop line does.
    """
    there = (codes & (_BACKGROUND_BIT | _CROSSWISE_BIT)) == 0
    return there & ~np.isin(codes & _CATEGORY_BITS, _LANE_CATEGORIES_LEFT_OUT)


def read_ids(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W] of a mask of ids.

    Raises:
        InputError: it is broken, of another size than its image, or a picture in colours.
    """
    with explaining("A mask cannot be read.", path), Image.open(path) as image:
        mode, ids = image.mode, np.asarray(image)
    if mode not in ("L", "P", "1") or ids.shape != shape:
        raise InputError(
            "A mask does not fit its image.",
            where=path,
            observed=f"mode {mode}, {ids.shape}",
            expected=f"ids in one channel of 8 bits, {shape}",
            change="give the masks of ids, not those in colours" if mode == "RGB" else None,
        )
    return ids.astype(np.uint8)
