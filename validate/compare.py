"""The same token batches through a stage, and its logits against those of another stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from polygraphy.comparator import (
    Comparator,
    CosineSimilarityCompareFunc,
    RunResults,
    SimpleCompareFunc,
)

from pipeline.export.contract import INPUT_IDS, LOGITS, PIXEL_VALUES
from pipeline.runtime.sessions.image_sessions import ImageSession
from pipeline.runtime.sessions.session import Session
from validate.metrics import LogitMetrics, compare_logits
from validate.runners import ImageRunner, SessionRunner, quiet_polygraphy


@dataclass(frozen=True)
class StageLogits:
    """What a stage answered to the token batches.

    Attributes:
        results: Polygraphy's record, with one iteration per batch under the stage's name.
        inference_s: seconds in the backend, all batches together.
    """

    name: str
    results: RunResults
    inference_s: float

    def arrays(self) -> list[np.ndarray]:
        """The logits, one float32 [B, S, V] per batch; of images, [B, classes]."""
        return [iteration[LOGITS] for iteration in self.results[self.name]]


@dataclass(frozen=True)
class Comparison:
    """A stage against another one.

    Attributes:
        other: name of the other stage.
        metrics: per token, over all batches.
        batch_cosine: Polygraphy's cosine of whole outputs, of the worst batch.
        batch_max_error: Polygraphy's largest absolute error.
        batch_mean_error: Polygraphy's mean absolute error, averaged over the batches.
    """

    other: str
    metrics: LogitMetrics
    batch_cosine: float
    batch_max_error: float
    batch_mean_error: float


@dataclass(frozen=True)
class ImageInputs:
    """What every stage of an image classifier is given.

    Attributes:
        batches: float32 [B, C, H, W] each.
        labels: int64 [N] of all images, or None.
    """

    batches: list[np.ndarray]
    labels: np.ndarray | None


def run_images(name: str, session: ImageSession, batches: Sequence[np.ndarray]) -> StageLogits:
    """Feed every batch, float32 [B, C, H, W], to a session."""
    feeds = [{PIXEL_VALUES: np.ascontiguousarray(batch)} for batch in batches]
    with quiet_polygraphy():
        results = Comparator.run([ImageRunner(name, session)], data_loader=feeds)
    return StageLogits(name, results, sum(iteration.runtime for iteration in results[name]))


def run_batches(name: str, session: Session, token_batches: Sequence[np.ndarray]) -> StageLogits:
    """Feed every batch, int64 [B, S], to a session, each on an empty cache."""
    feeds = [{INPUT_IDS: np.ascontiguousarray(batch)} for batch in token_batches]
    with quiet_polygraphy():
        results = Comparator.run([SessionRunner(name, lambda: session)], data_loader=feeds)
    return StageLogits(name, results, sum(iteration.runtime for iteration in results[name]))


def compare_stages(stage: StageLogits, other: StageLogits) -> Comparison:
    """Compare the logits of `stage` with those of `other`, the reference.

    Raises:
        ValueError: the two were given different batches, or have different vocabularies.
    """
    pairs = list(zip(stage.arrays(), other.arrays(), strict=True))
    for own, reference in pairs:
        if own.shape != reference.shape:
            raise ValueError(f"logits {own.shape} against {reference.shape}")
    cosines, max_errors, mean_errors = polygraphy_statistics(stage, other)
    width = pairs[0][0].shape[-1]
    own_rows = np.concatenate([own.reshape(-1, width) for own, _ in pairs])
    reference_rows = np.concatenate([reference.reshape(-1, width) for _, reference in pairs])
    return Comparison(
        other=other.name,
        metrics=compare_logits(reference_rows, own_rows),
        batch_cosine=min_or_nan(cosines),
        batch_max_error=-min_or_nan([-error for error in max_errors]),
        batch_mean_error=float(np.mean(mean_errors)),
    )


def polygraphy_statistics(
    stage: StageLogits, other: StageLogits
) -> tuple[list[float], list[float], list[float]]:
    """Cosine, largest and mean error of each batch.

    The tolerances given here are infinite: Polygraphy measures, `validate.verdict` judges.
    """
    both = RunResults([*stage.results.lst, *other.results.lst])
    with quiet_polygraphy():
        simple, cosine = Comparator.compare_accuracy(
            both,
            compare_func=[
                SimpleCompareFunc(atol=math.inf, rtol=math.inf),
                CosineSimilarityCompareFunc(cosine_similarity_threshold=-1.0),
            ],
        )
    pair = (stage.name, other.name)
    errors = [iteration[LOGITS] for iteration in simple[pair]]
    cosines = [iteration[LOGITS].cosine_similarity for iteration in cosine[pair]]
    return (
        cosines,
        [result.max_absdiff for result in errors],
        [result.mean_absdiff for result in errors],
    )


def min_or_nan(values: Sequence[float]) -> float:
    """The least value; NaN if any is NaN, which Python's min would hide."""
    return float(np.min(values))
