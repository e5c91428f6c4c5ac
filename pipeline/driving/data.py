"""What a user calls a set of driving images, opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.artefact import write_json
from pipeline.driving.bdd import is_bdd, open_bdd, read_ids
from pipeline.driving.sample import (
    NO_BOXES,
    Complaints,
    DrivingSet,
    Sample,
    images_in,
    open_image,
    some_places,
)
from pipeline.driving.scenes.domain import DOMAINS, Domain, domain_named
from pipeline.driving.scenes.scene import Scene, draw_scene, scene_set
from pipeline.errors import InputError, UsageError
from pipeline.progress import track

_QUALITY = 92  # of JPEG
_LANE, _BACKGROUND = 6, 255  # single white, as BDD100K numbers it
_DIRECT, _NO_AREA = 0, 2
KINDS = ("vehicle", "drivable", "lane")
LAYOUT = "images/ and, of the same names, labels/ (a PNG of class ids for each image)"
_SMALLEST = 8  # pixels of a component's shorter side, below which it is no vehicle to be found
_SCENES = "scenes"
FORMATS = (
    f"{_SCENES}:DOMAIN:COUNT ({' or '.join(DOMAINS)}, drawn by seed), a folder laid out like "
    f"BDD100K, or FOLDER:drivable=3,vehicle=8 with {LAYOUT}"
)
SPLITS = ("train", "val")
_VALIDATED = 10
# Seeds of validation scenes, which no training reaches.
_FIRST_SEED = {"train": 0, "val": 10_000_000}


def _write_scenes(folder: Path, split: str, scenes: Iterable[tuple[str, Scene]]) -> None:
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


def _open_folder(folder: Path, ids: Mapping[str, frozenset[int]]) -> DrivingSet:
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


def open_data(spec: str, split: str, size: tuple[int, int]) -> DrivingSet:
    """Open a set.

    Args:
        spec: FORMATS. Of a folder that has one folder for each split, that one is taken.
        split: `train` or `val`; validation scenes have seeds of their own.
        size: height and width of scenes.

    Raises:
        InputError: there is nothing of that kind, or it is broken.
        UsageError: the spec makes no sense.
    """
    name, _, rest = spec.partition(":")
    if name == _SCENES:
        return _scenes(spec, rest, split, size)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError("There is no such set of images.", where=spec, expected=FORMATS)
    if not rest and is_bdd(folder):
        return open_bdd(folder, split)
    own = folder / split
    if own.is_dir():
        return _open_folder(own, _ids(spec, rest))
    return _part(_open_folder(folder, _ids(spec, rest)), split)


def _part(data: DrivingSet, split: str) -> DrivingSet:
    """Of a folder without splits, every tenth image is one to validate on."""
    everything = range(len(data))
    validated = set(everything[_VALIDATED - 1 :: _VALIDATED] or everything[-1:])
    places = [place for place in everything if (place in validated) == (split == "val")]
    return replace(
        data, names=[data.names[p] for p in places], read=lambda place: data.read(places[place])
    )


def scene_domain(spec: str) -> Domain | None:
    """The domain of scenes that a spec means; None where it means something else.

    Raises:
        UsageError: scenes of no domain that there is.
    """
    name, _, rest = spec.partition(":")
    return domain_named(rest.partition(":")[0]) if name == _SCENES else None


def draw_scenes(
    spec: str, split: str, size: tuple[int, int], folder: Path, most: int | None = None
) -> None:
    """Draw a split of a set of scenes once, into a folder in BDD100K's own form.

    Args:
        spec: `scenes:DOMAIN:COUNT`.
        split: `train` or `val`.
        size: height and width.
        folder: to write into.
        most: so many of them, spread evenly; None draws all.

    Raises:
        UsageError: the spec means no scenes.
    """
    found, data = scene_domain(spec), open_data(spec, split, size)
    if found is None:
        raise UsageError("These are no scenes.", observed=spec, expected=f"{_SCENES}:DOMAIN:COUNT")
    places = some_places(data, len(data) if most is None else most)
    drawn = (
        (data.names[place], draw_scene(_FIRST_SEED[split] + place, found, size))
        for place in track(places, f"scenes of domain {found.name}, {split}")
    )
    _write_scenes(folder, split, drawn)


def _scenes(spec: str, rest: str, split: str, size: tuple[int, int]) -> DrivingSet:
    domain, _, count = rest.partition(":")
    if not count.isdecimal() or not 0 < int(count) <= _FIRST_SEED["val"]:
        raise UsageError(
            "It is not said how many scenes.", observed=spec, expected=f"{_SCENES}:DOMAIN:COUNT"
        )
    return scene_set(int(count), domain_named(domain), size, _FIRST_SEED[split])


def _ids(spec: str, rest: str) -> dict[str, frozenset[int]]:
    """Class ids of each kind, of `drivable=3,vehicle=8+9`."""
    found: dict[str, frozenset[int]] = {}
    for part in filter(None, rest.split(",")):
        kind, _, numbers = part.partition("=")
        ids = numbers.split("+")
        if kind not in KINDS or not all(i.isdecimal() and int(i) < 256 for i in ids):
            raise UsageError(
                "This says no class ids.",
                where=spec,
                observed=part,
                expected=f"one of {', '.join(KINDS)}, =, and ids from 0 to 255 joined by +",
            )
        found[kind] = frozenset(int(i) for i in ids)
    return found
