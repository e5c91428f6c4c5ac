"""What a user calls a set of driving images, opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.driving.bdd import is_bdd, open_bdd
from pipeline.driving.folder import KINDS, LAYOUT, open_folder
from pipeline.driving.sample import DrivingSet
from pipeline.driving.scenes.domain import DOMAINS, Domain, domain_named
from pipeline.driving.scenes.scene import scene_set
from pipeline.errors import InputError, UsageError

_SCENES = "scenes"
FORMATS = (
    f"{_SCENES}:DOMAIN:COUNT ({' or '.join(DOMAINS)}, drawn by seed), a folder laid out like "
    f"BDD100K, or FOLDER:drivable=3,vehicle=8 with {LAYOUT}"
)
SPLITS = ("train", "val")
_VALIDATED = 10
# Seeds of validation scenes, which no training reaches.
_FIRST_SEED = {"train": 0, "val": 10_000_000}


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
        return open_folder(own, _ids(spec, rest))
    return _part(open_folder(folder, _ids(spec, rest)), split)


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
