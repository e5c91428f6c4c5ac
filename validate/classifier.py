"""The ledger of an image classifier: logits and accuracy, by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import UsageError
from pipeline.model.task import IMAGES, Task
from pipeline.runtime.sessions.image_sessions import (
    EngineImages,
    ImageSession,
    OnnxImages,
    TorchImages,
)
from validate.artefacts import Artefacts
from validate.compare import StageLogits
from validate.ledger import Adapter, Column, Drawn, Loaded
from validate.record import Accuracy, Row
from validate.stages import Openers, Tolerance

_BATCH = 16
# The standard error of an accuracy of 80% is then 1.2%.
_DEFAULT_IMAGES = 1024


@dataclass(frozen=True)
class ImageOptions:
    """On which images, and on how many of them.

    Attributes:
        images: as `pipeline.calibrate.images.load_images` takes them.
        count: how many of them, drawn; None for all.
    """

    images: str | None
    count: int | None = _DEFAULT_IMAGES
    task: ClassVar[Task] = IMAGES

    def check(self, artefacts: Artefacts) -> None:
        """Raise UsageError where there are no images."""
        if self.images is None:
            from pipeline.calibrate.images import FORMATS

            raise UsageError(
                "An image classifier is validated on images.", where="--images", expected=FORMATS
            )


@dataclass(frozen=True)
class _Inputs:
    """What every stage is given.

    Attributes:
        batches: float32 [B, C, H, W] each.
        labels: int64 [N] of all images, or None.
    """

    batches: list[np.ndarray]
    labels: np.ndarray | None

    def describe(self) -> dict[str, Any]:
        """What a reader of the ledger knows its columns by."""
        return {"task": IMAGES}


@dataclass(frozen=True)
class _Outputs:
    """What a stage answered."""

    logits: StageLogits
    accuracy: Accuracy | None
    cached: ClassVar[None] = None

    def complaints(self, tolerance: Tolerance, reference: _Outputs | None) -> list[str]:
        """None: an accuracy is always a number."""
        return []

    def row_fields(self, reference: _Outputs | None, original: _Outputs | None) -> dict[str, Any]:
        """Accuracy."""
        return {"accuracy": self.accuracy}


def _options(
    original: str, *, images: str | None = None, image_count: int | None = None, **text: Any
) -> ImageOptions:
    """The options among the flags that were given; raise UsageError for those of texts."""
    if text:
        raise UsageError(
            "An image classifier takes no text.",
            where=", ".join("--" + name.replace("_", "-") for name in text),
            observed=original,
            change="give --images",
        )
    return ImageOptions(images, image_count or _DEFAULT_IMAGES)


def _load(
    original: str,
    options: ImageOptions,
    seed: int,
    trust_remote_code: bool,
    tell: Callable[[str], None],
) -> Loaded:
    """The model in float32 and the images that are drawn."""
    from pipeline.calibrate.images import load_images
    from pipeline.model.load import load_classifier

    loaded = load_classifier(original, trust_remote_code=trust_remote_code)
    batch = load_images(
        str(options.images), loaded.model, loaded.processor, count=options.count, seed=seed
    )
    tell(f"{len(batch.pixels)} images of {batch.source}")
    inputs = _Inputs(
        [part.numpy() for part in batch.pixels.split(_BATCH)],
        None if batch.labels is None else batch.labels.numpy(),
    )
    return Loaded(loaded.model, inputs, {"images": batch.describe()})


def _measure(
    name: str, session: ImageSession, inputs: _Inputs, watched: Mapping[str, _Outputs]
) -> _Outputs:
    """Logits of a session, and its accuracy where there are labels."""
    logits = StageLogits.of(name, session.classify, inputs.batches)
    return _Outputs(logits, _accuracy_of(np.concatenate(logits.arrays()), inputs.labels))


def _accuracy_of(logits: np.ndarray, labels: np.ndarray | None) -> Accuracy | None:
    """Share of images whose likeliest class is the label, with its binomial standard error.

    Args:
        logits: float [N, classes].
        labels: int64 [N], or None.
    """
    if labels is None:
        return None
    correct = int((logits.argmax(axis=-1) == labels).sum())
    share = correct / len(labels)
    return Accuracy(share, float(np.sqrt(share * (1 - share) / len(labels))), len(labels))


def _accuracy_cell(row: Row) -> str | None:
    if row.accuracy is None:
        return None
    return f"{row.accuracy.value:.2%} ± {row.accuracy.standard_error:.2%}"


def _accuracy(row: Row) -> tuple[float, float] | None:
    found = row.accuracy
    return None if found is None else (100 * found.value, 100 * found.standard_error)


CLASSIFIER = Adapter(
    options=_options,
    load=_load,
    openers=Openers(TorchImages, OnnxImages, EngineImages),
    measure=_measure,
    item="image",
    per_item="an image",
    top1="Images whose likeliest class is the original's.",
    columns=(
        Column(
            "accuracy", "Images classified as labelled, with its standard error.", _accuracy_cell
        ),
    ),
    drawn=Drawn("Accuracy, %, with one standard error", _accuracy, limits=(0, 100)),
)
