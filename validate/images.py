"""The same images through every stage of an image classifier, one ledger."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import PipelineError, UsageError
from pipeline.provenance import provenance
from validate.compare import Comparison, ImageInputs, compare_stages, run_images
from validate.record import Accuracy, Ledger, Row
from validate.rounding import read_rounding
from validate.stages import (
    DENSE_PRODUCT,
    ORIGINAL,
    SAME_IN_FLOAT16,
    SAME_MATRIX,
    SKIP_FORM,
    Artefacts,
    Stage,
    export_record_if_readable,
    labelled,
    onnx_tolerance,
)
from validate.verdict import judge, not_run

if TYPE_CHECKING:
    from pipeline.calibrate.images import ImageBatch
    from pipeline.runtime.sessions.image_sessions import ImageSession

logger = logging.getLogger(__name__)
BATCH = 16
# The standard error of an accuracy of 80% is then 1.2%.
DEFAULT_IMAGES = 1024


@dataclass(frozen=True)
class ImageValidateRequest:
    """What to validate, and on which images.

    Attributes:
        artefacts: the stages' files.
        images: as `pipeline.calibrate.images.load_images` takes them.
        count: how many of them, drawn; None for all.
        max_kl: most KL to the original, nats an image; None sets no limit.
        strict: let an engine that cannot run here count as a failure.
        seed: of the draw.
        trust_remote_code: let the original's own Python code run.
    """

    artefacts: Artefacts
    images: str
    count: int | None = DEFAULT_IMAGES
    max_kl: float | None = None
    strict: bool = False
    seed: int = 0
    trust_remote_code: bool = False


def validate_images(
    request: ImageValidateRequest, progress: Callable[[str], None] = lambda message: None
) -> Ledger:
    """Run the ledger of an image classifier.

    Raises:
        InputError: the original or the images do not load, or do not fit each other.
    """
    from pipeline.calibrate.images import load_images
    from pipeline.model.load_classifier import load_classifier
    from pipeline.runtime.sessions.image_sessions import TorchImages

    progress(f"loading {request.artefacts.original}")
    loaded = load_classifier(
        request.artefacts.original, trust_remote_code=request.trust_remote_code
    )
    batch = load_images(
        request.images, loaded.model, loaded.processor, count=request.count, seed=request.seed
    )
    progress(f"{len(batch.pixels)} images of {batch.source}")
    stages = image_stages(request, lambda: TorchImages(loaded.model, ORIGINAL))
    rows = run_image_stages(stages, batch, strict=request.strict, progress=progress)
    checkpoint = request.artefacts.checkpoint
    rounding = None if checkpoint is None else read_rounding(checkpoint)
    return Ledger(rows, describe(request, batch), provenance(), rounding)


def image_stages(
    request: ImageValidateRequest, open_original: Callable[[], ImageSession]
) -> list[Stage]:
    """Original, compressed in its two forms, ONNX Runtime and TensorRT, as of a decoder."""
    artefacts, stages, reference = request.artefacts, [], ORIGINAL
    if artefacts.checkpoint is not None:
        dense, skip = (
            functools.partial(_open_checkpoint, artefacts.checkpoint, dense=form)
            for form in (True, False)
        )
        stages.append(Stage(DENSE_PRODUCT, dense, ORIGINAL))
        stages.append(Stage(SKIP_FORM, skip, DENSE_PRODUCT, SAME_MATRIX))
        reference = SKIP_FORM
    for folder, label in labelled(artefacts.onnx):
        name = f"onnxruntime {label}"
        tolerance = onnx_tolerance(export_record_if_readable(folder))
        stages.append(
            Stage(name, functools.partial(_open_onnx, folder, name), reference, tolerance)
        )
    for folder, label in labelled(artefacts.engines):
        name = f"tensorrt {label}"
        opener = functools.partial(_open_engine, folder, name)
        stages.append(Stage(name, opener, reference, SAME_IN_FLOAT16, required=False))
    limited = [
        replace(stage, tolerance=replace(stage.tolerance, max_kl=request.max_kl))
        for stage in stages
    ]
    return [Stage(ORIGINAL, open_original), *limited]


def run_image_stages(
    stages: Sequence[Stage],
    batch: ImageBatch,
    *,
    strict: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Run and compare all stages; a stage that breaks becomes a row that says so."""
    inputs = ImageInputs(
        [part.numpy() for part in batch.pixels.split(BATCH)],
        None if batch.labels is None else batch.labels.numpy(),
    )
    kept: dict[str, Any] = {}
    rows = []
    for place, stage in enumerate(stages):
        progress(f"[{place + 1}/{len(stages)}] {stage.name}")
        try:
            rows.append(_run_stage(stage, inputs, kept))
        except PipelineError as error:
            rows.append(_broken(stage, str(error), required=stage.required or strict))
        except Exception as error:
            logger.exception("stage '%s' broke", stage.name)
            rows.append(_broken(stage, f"internal error: {type(error).__name__}: {error}"))
    return rows


def _broken(stage: Stage, reason: str, *, required: bool = True) -> Row:
    return Row(stage.name, stage.reference, stage.tolerance, not_run(reason, required=required))


def _run_stage(stage: Stage, inputs: ImageInputs, kept: dict[str, Any]) -> Row:
    start = time.perf_counter()
    logits = run_images(stage.name, stage.open(), inputs.batches)
    comparisons: dict[str, Comparison] = {
        name: compare_stages(logits, kept[name])
        for name in {stage.reference, ORIGINAL}
        if name in kept
    }
    to_reference = comparisons.get(stage.reference or "")
    to_original = comparisons.get(ORIGINAL)
    kept[stage.name] = logits
    is_original = stage.name == ORIGINAL
    verdict = judge(stage.tolerance, to_reference, to_original, None, is_original=is_original)
    return Row(
        name=stage.name,
        reference=stage.reference,
        tolerance=stage.tolerance,
        verdict=verdict,
        to_reference=to_reference,
        to_original=to_original,
        accuracy=accuracy_of(np.concatenate(logits.arrays()), inputs.labels),
        inference_s=logits.inference_s,
        total_s=time.perf_counter() - start,
    )


def accuracy_of(logits: np.ndarray, labels: np.ndarray | None) -> Accuracy | None:
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


def describe(request: ImageValidateRequest, batch: ImageBatch) -> dict[str, Any]:
    """What went in, for the ledger."""
    artefacts = request.artefacts
    return {
        "task": "image-classification",
        "original": artefacts.original,
        "checkpoint": None if artefacts.checkpoint is None else str(artefacts.checkpoint),
        "onnx": [str(folder) for folder in artefacts.onnx],
        "engines": [str(folder) for folder in artefacts.engines],
        "images": batch.describe(),
    }


def require_images(images: str | None) -> str:
    """The images of a command line; raise UsageError where there are none."""
    if images is None:
        from pipeline.calibrate.images import FORMATS

        raise UsageError(
            "An image classifier is validated on images.", where="--images", expected=FORMATS
        )
    return images


def _open_checkpoint(folder: Path, *, dense: bool) -> ImageSession:
    import torch

    from pipeline.checkpoint.dense import densify_
    from pipeline.checkpoint.folder import load_checkpoint
    from pipeline.runtime.sessions.image_sessions import TorchImages

    model = load_checkpoint(folder, dtype=torch.float32)
    if dense:
        densify_(model)
    return TorchImages(model, DENSE_PRODUCT if dense else SKIP_FORM)


def _open_onnx(folder: Path, name: str) -> ImageSession:
    from pipeline.runtime.sessions.image_sessions import OnnxImages

    return OnnxImages(folder, name)


def _open_engine(folder: Path, name: str) -> ImageSession:
    from pipeline.runtime.sessions.image_sessions import EngineImages

    return EngineImages(folder, name)
