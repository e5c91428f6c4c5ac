"""An image and what is known of it, whatever its labels were written in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import InputError
from pipeline.model.loading import explaining

NO_BOXES = np.zeros((0, 4), np.float32)
_SUFFIXES = (".jpg", ".jpeg", ".png")
_NAMED = 3  # examples of each complaint


@dataclass(frozen=True)
class Sample:
    """One labelled image; a kind of label that is not there is None, which is not the same as none.

    Attributes:
        image: uint8 [H, W, 3].
        boxes: float32 [N, 4], x1, y1, x2, y2 in pixels, half open.
        classes: int64 [N].
        ignored: float32 [M, 4], crowds and the like: found or not, they do not count.
        drivable: bool [H, W].
        lane: bool [H, W].
    """

    image: np.ndarray
    boxes: np.ndarray | None = None
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    ignored: np.ndarray = field(default_factory=lambda: NO_BOXES)
    drivable: np.ndarray | None = None
    lane: np.ndarray | None = None


@dataclass
class Complaints:
    """What of a set was left out, and why: counted, with the first few by name.

    Attributes:
        counts: of each reason.
        examples: names, for each reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count one more."""
        self.counts[reason] += count
        named = self.examples.setdefault(reason, [])
        if name not in named and len(named) < _NAMED:
            named.append(name)

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first."""
        return [
            f"{reason}: {count} ({', '.join(self.examples[reason])}{', ...' * (count > _NAMED)})"
            for reason, count in self.counts.most_common()
        ]


@dataclass(frozen=True)
class DrivingSet:
    """Labelled images that are there to be read.

    Attributes:
        source: what the user called them.
        names: of the images, in order.
        read: place to sample.
        complaints: what was left out when labels were read.
    """

    source: str
    names: Sequence[str]
    read: Callable[[int], Sample]
    complaints: Complaints

    def __len__(self) -> int:
        return len(self.names)


def some_places(data: DrivingSet, count: int) -> list[int]:
    """Places of at most so many images, spread evenly over a set."""
    taken = min(count, len(data))
    return [place * len(data) // taken for place in range(taken)]


def images_in(folder: Path) -> dict[str, Path]:
    """The image files that lie in a folder, in order, by their names without the ending."""
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in _SUFFIXES}


def images_at(paths: Sequence[Path]) -> list[Path]:
    """Image files, and those that lie in folders, in order.

    Raises:
        InputError: a path is neither, or there is no image.
    """
    found: list[Path] = []
    for path in paths:
        files = list(images_in(path).values()) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise InputError(
                "There is no image here.",
                where=path,
                expected=f"an image, or a folder of images ({', '.join(_SUFFIXES)})",
            )
        found += files
    return found


def open_image(path: object) -> np.ndarray:
    """uint8 [H, W, 3] of an image file in any mode, turned as its EXIF says.

    Raises:
        InputError: it is broken, cut off, or no image.
    """
    with explaining("An image cannot be read.", path), Image.open(path) as image:  # type: ignore[arg-type]
        turned = ImageOps.exif_transpose(image)
        if turned.mode in ("I", "F") or turned.mode.startswith("I;16"):
            # Pillow cuts 16 bits off at 255: all would be white.
            deep = np.asarray(turned, dtype=np.float32)
            scaled = deep * (255.0 / (65535.0 if deep.max(initial=0) > 255 else 255.0))
            turned = Image.fromarray(scaled.astype(np.uint8))
        return np.asarray(turned.convert("RGB"))
