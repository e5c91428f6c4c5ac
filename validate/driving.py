"""The ledger of a driving network: its maps by image, its boxes and masks against labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.driving.data import FORMATS, open_data
from pipeline.driving.evaluate import LEAST_SCORE, MapsOfBatch
from pipeline.driving.letterbox import Letterbox
from pipeline.driving.load import load_driving
from pipeline.driving.perceive import Perception
from pipeline.driving.sample import Sample, images_at, open_image, some_places
from pipeline.driving.scores import ImageScore, agreement, scores_of, standard_errors
from pipeline.errors import UsageError
from pipeline.model.task import DRIVING, Task
from pipeline.provenance import public_name
from pipeline.runtime.sessions.driving_sessions import (
    DrivingSession,
    EngineDriving,
    OnnxDriving,
    TorchDriving,
)
from validate.artefacts import Artefacts
from validate.compare import Comparison, StageLogits
from validate.ledger import Adapter, Column, Drawn, Loaded
from validate.metrics import LogitMetrics
from validate.record import DrivingScores, Row
from validate.stages import Openers, Tolerance

_BATCH = 8
_DEFAULT_IMAGES = 160
# With standard errors, and what a stage must not lose.
_CHIEF = {
    "ap50": "AP50 of vehicles.",
    "drivable_miou": "Mean IoU of the drivable area and of the rest.",
    "lane_iou": "IoU of lane pixels.",
    "lane_recall": "Recall of lane pixels.",
    "lane_f2": "F of lane pixels within 2 pixels of the other mask's.",
}


@dataclass(frozen=True)
class _DrivingOptions:
    """On which images, and on how many of them.

    Attributes:
        data: a labelled set, as `pipeline.driving.data.open_data` takes it, or None.
        images: a folder of images without labels, or None.
        count: of images, the most, spread evenly.
    """

    data: str | None
    images: str | None
    count: int = _DEFAULT_IMAGES
    task: ClassVar[Task] = DRIVING

    def check(self, artefacts: Artefacts) -> None:
        """Raise UsageError unless there is one set of images."""
        if (self.data is None) == (self.images is None):
            raise UsageError(
                "A driving network is validated on one set of images.",
                where="--data or --images",
                observed="neither" if self.data is None else "both",
                expected=f"--data {FORMATS}; or --images, a folder of images without labels",
            )


@dataclass(frozen=True)
class _Inputs:
    """What every stage is given.

    Attributes:
        batches: float32 [B, 3, H, W] each.
        placed: where each image lies in the input.
        truth: what is known of each image, without its pixels; None of images without labels.
    """

    batches: list[np.ndarray]
    placed: list[Letterbox]
    truth: list[Sample] | None

    def describe(self) -> dict[str, Any]:
        """What a reader of the ledger knows its columns by."""
        return {"task": DRIVING}


@dataclass(frozen=True)
class _MapLogits(StageLogits):
    """All maps of an image as a row; KL and agreement are of its masks' pixels.

    Attributes:
        widths: how many of a row are of each map, those of the two masks last.
    """

    widths: tuple[int, ...] = ()

    def compare(self, other: StageLogits, demands: Tolerance) -> Comparison:
        """As of any stage, but for what is of one map: large masks would hide boxes.

        A cosine is that of the image's worst map, and an error relative to the largest number of
        its own map; KL is in nats a pixel, and at most the mean of an image.
        """
        found = super().compare(other, demands)
        ends = np.cumsum(self.widths)[:-1]
        own, reference = (
            np.split(np.concatenate(stage.arrays()), ends, axis=1) for stage in (self, other)
        )
        pairs = list(zip(own, reference, strict=True))
        of_maps = [LogitMetrics.of(b, a) for a, b in pairs]
        masks = [(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs[-2:]]
        kl = np.mean([_mask_kl(b, a).mean(axis=1) for a, b in masks], axis=0)
        same = np.mean([((a > 0) == (b > 0)).mean(axis=1) for a, b in masks], axis=0)
        metrics = replace(
            found.metrics,
            min_cosine=float(np.min([one.min_cosine for one in of_maps])),
            mean_cosine=float(np.min([one.mean_cosine for one in of_maps])),
            relative_error=float(np.max([one.relative_error for one in of_maps])),
            kl_mean=float(kl.mean()),
            kl_max=float(kl.max()),
            top1_agreement=float(same.mean()),
        )
        return replace(found, metrics=metrics)


def _mask_kl(reference: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """KL(reference || stage) of the decision on each pixel, nats.

    Args:
        reference: float64 [...], logits.
        stage: float64 [...].
    """
    p = 0.5 * (1 + np.tanh(0.5 * reference))
    log_ratio = np.logaddexp(0, -stage) - np.logaddexp(0, -reference)
    log_other = np.logaddexp(0, stage) - np.logaddexp(0, reference)
    divergence: np.ndarray = p * log_ratio + (1 - p) * log_other
    return divergence


@dataclass(frozen=True)
class _Outputs:
    """What a stage answered."""

    logits: _MapLogits
    seen: list[Perception]
    scores: dict[str, float | None]
    standard_errors: dict[str, float | None]
    cached: ClassVar[None] = None

    def complaints(self, tolerance: Tolerance, reference: _Outputs | None) -> list[str]:
        """Scores that are further below the reference's than they may be."""
        most = tolerance.max_score_drop
        if reference is None or most is None:
            return []
        drops = {
            name: before - after
            for name in _CHIEF
            if (before := reference.scores.get(name)) is not None
            and (after := self.scores.get(name)) is not None
        }
        return [
            f"{name} is {drop:.4f} below that of '{reference.logits.name}', at most {most:g} is "
            "allowed"
            for name, drop in drops.items()
            if not drop <= most
        ]

    def row_fields(self, reference: _Outputs | None, original: _Outputs | None) -> dict[str, Any]:
        """Scores against labels, and how alike what is seen is to what the original sees."""
        alike = None if original is None else agreement(self.seen, original.seen)
        errors = self.standard_errors
        return {"driving": DrivingScores(len(self.seen), self.scores, errors, alike)}


def _options(
    original: str,
    *,
    data: str | None = None,
    images: str | None = None,
    image_count: int | None = None,
    **text: Any,
) -> _DrivingOptions:
    """The options among the flags that were given; raise UsageError for those of texts."""
    if text:
        raise UsageError(
            "A driving network takes no text.",
            where=", ".join("--" + name.replace("_", "-") for name in text),
            observed=original,
            change="give --data or --images",
        )
    return _DrivingOptions(data, images, image_count or _DEFAULT_IMAGES)


def _load(
    original: str,
    options: _DrivingOptions,
    seed: int,
    trust_remote_code: bool,
    tell: Callable[[str], None],
) -> Loaded:
    """The network in float32 and the images; which these are does not depend on chance."""
    loaded = load_driving(original)
    height, width = loaded.model.config.image_size
    samples, source = _samples(options, (height, width))
    tell(f"{len(samples)} images of {source['source']}")
    inputs = _Inputs([], [], None if options.data is None else [])
    for first in range(0, len(samples), _BATCH):
        part = [samples[i]() for i in range(first, min(first + _BATCH, len(samples)))]
        pixels = loaded.processor([sample.image for sample in part])["pixel_values"]
        inputs.batches.append(pixels.numpy())
        inputs.placed.extend(loaded.processor.place(sample.image) for sample in part)
        if inputs.truth is not None:
            inputs.truth.extend(replace(s, image=np.empty((0, 0, 3), np.uint8)) for s in part)
    return Loaded(loaded.model, inputs, {"images": source})


def _samples(
    options: _DrivingOptions, size: tuple[int, int]
) -> tuple[Sequence[Callable[[], Sample]], dict[str, Any]]:
    """What reads each image that is taken, and what the ledger says of them."""
    source: dict[str, Any]
    if options.data is None:
        assert options.images is not None, "`check` asks for one of them"
        files = images_at([Path(options.images)])[: options.count]
        source = {"source": public_name(options.images), "labelled": False}
        return [partial(_unlabelled, file) for file in files], source
    data = open_data(options.data, "val", size)
    places = some_places(data, options.count)
    source = {
        "source": public_name(options.data),
        "labelled": True,
        "left_out": data.complaints.lines(),
    }
    return [partial(data.read, place) for place in places], source


def _unlabelled(file: Path) -> Sample:
    return Sample(open_image(file))


def _measure(
    name: str, session: DrivingSession, inputs: _Inputs, watched: Mapping[str, _Outputs]
) -> _Outputs:
    """Maps of a session, what is seen in them, and its scores where there are labels."""
    seen: list[Perception] = []

    def forward(pixels: np.ndarray) -> np.ndarray:
        maps = session.maps(pixels)
        batches.append(maps)
        rows = [*maps.boxes, maps.drivable, maps.lane]
        return np.concatenate([one.reshape(len(pixels), -1) for one in rows], axis=1)

    batches: list[MapsOfBatch] = []
    answered = StageLogits.of(name, forward, inputs.batches)
    for maps in batches:
        for row in range(len(maps.drivable)):
            placed = inputs.placed[len(seen)]
            seen.append(maps.seen(row, session.traits.anchors, placed, LEAST_SCORE))
    widths = tuple(math.prod(shape) for shape in session.traits.map_shapes.values())
    logits = _MapLogits(name, answered.results, answered.inference_s, widths)
    if inputs.truth is None:
        return _Outputs(logits, seen, {}, {})
    images = [ImageScore.of(*pair) for pair in zip(seen, inputs.truth, strict=True)]
    return _Outputs(logits, seen, scores_of(images), standard_errors(images, list(_CHIEF)))


def _score_cell(name: str, row: Row) -> str | None:
    found = row.driving
    if found is None or found.scores.get(name) is None:
        return None
    error = found.standard_errors.get(name)
    return f"{found.scores[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _alike_cell(row: Row) -> str | None:
    found = None if row.driving is None else row.driving.to_original
    if found is None:
        return None
    names = ("boxes_f", "drivable_iou", "lane_iou")
    return " / ".join("-" if found[n] is None else f"{found[n]:.4f}" for n in names)


def _lane_iou(row: Row) -> tuple[float, float | None] | None:
    found = row.driving
    value = None if found is None else found.scores.get("lane_iou")
    if found is None or value is None:
        return None
    return value, found.standard_errors.get("lane_iou")


DRIVING_NETWORK = Adapter(
    options=_options,
    load=_load,
    openers=Openers(
        TorchDriving, OnnxDriving, EngineDriving, unoptimised=partial(OnnxDriving, optimised=False)
    ),
    measure=_measure,
    item="image",
    per_item="a pixel of the masks",
    top1="Pixels of both masks that are on the original's side; the background is most of them.",
    columns=(
        Column(
            "boxes / drivable / lane",
            "As the original sees them: F of boxes that overlap by half, IoU of the masks.",
            _alike_cell,
        ),
        *(
            Column(
                name.replace("_", " "),
                f"{words} With its standard error.",
                partial(_score_cell, name),
            )
            for name, words in _CHIEF.items()
        ),
    ),
    drawn=Drawn("IoU of lane pixels, with one standard error", _lane_iou, limits=(0, 1)),
    kl_item="pixel of the masks",
    agreement="pixel",
)
