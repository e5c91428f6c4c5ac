"""The same batches through a stage, and its logits against another's: both by Polygraphy.

What Polygraphy sees is whole outputs, a batch each; `validate.metrics` adds what it does not know:
figures by token or image, KL and top-1.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import (
    Comparator,
    CosineSimilarityCompareFunc,
    RunResults,
    SimpleCompareFunc,
    util,
)
from polygraphy.logger import G_LOGGER

from pipeline.export.contract import LOGITS
from validate.metrics import LogitMetrics
from validate.stages import Tolerance

_INPUT = "batch"
_Forward = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class StageLogits:
    """What a stage answered to the batches.

    Attributes:
        results: Polygraphy's record, with one iteration per batch under the stage's name.
        inference_s: seconds in the backend, all batches together.
    """

    name: str
    results: RunResults
    inference_s: float

    @classmethod
    def of(
        cls,
        name: str,
        forward: _Forward,
        batches: Sequence[np.ndarray],
        before: Callable[[], object] = lambda: None,
    ) -> StageLogits:
        """Feed every batch to a stage, and keep what it answers.

        Args:
            name: of the stage.
            forward: float32 logits of a batch.
            batches: int64 [B, S] or float32 [B, C, H, W] each.
            before: is called ahead of every batch, and does not count as inference.
        """
        feeds = [{_INPUT: np.ascontiguousarray(batch)} for batch in batches]
        runner = _Runner(name, forward, before, batches[0])
        with _quiet_polygraphy():
            results = Comparator.run([runner], data_loader=feeds)
        return cls(name, results, sum(iteration.runtime for iteration in results[name]))

    def arrays(self) -> list[np.ndarray]:
        """The logits, one float32 [B, S, V] per batch; of images, [B, classes]."""
        return [iteration[LOGITS] for iteration in self.results[self.name]]

    def compare(self, other: StageLogits, demands: Tolerance) -> Comparison:
        """The logits against those of `other`, the reference.

        Args:
            other: the reference.
            demands: what Polygraphy's verdict is about.

        Raises:
            ValueError: the two were given different batches, or have different vocabularies.
        """
        pairs = list(zip(self.arrays(), other.arrays(), strict=True))
        for own, reference in pairs:
            if own.shape != reference.shape:
                raise ValueError(f"logits {own.shape} against {reference.shape}")
        width = pairs[0][0].shape[-1]
        own_rows = np.concatenate([own.reshape(-1, width) for own, _ in pairs])
        reference_rows = np.concatenate([reference.reshape(-1, width) for _, reference in pairs])
        largest = float(np.abs(reference_rows).max())
        errors, cosines = _by_polygraphy(self, other, demands, largest)
        judged = demands.min_cosine is not None or demands.max_relative_error is not None
        return Comparison(
            other=other.name,
            metrics=LogitMetrics.of(reference_rows, own_rows),
            # NumPy's, since Python's min and max would hide NaN.
            batch_cosine=float(np.min([result.cosine_similarity for result in cosines])),
            batch_max_error=float(np.max([result.max_absdiff for result in errors])),
            batch_mean_error=float(np.mean([result.mean_absdiff for result in errors])),
            polygraphy_passed=all(map(bool, errors + cosines)) if judged else None,
        )


@dataclass(frozen=True)
class Comparison:
    """A stage against another one.

    Attributes:
        other: name of the other stage.
        metrics: per token or image, over all batches.
        batch_cosine: Polygraphy's cosine of whole outputs, of the worst batch.
        batch_max_error: Polygraphy's largest absolute error.
        batch_mean_error: Polygraphy's mean absolute error, averaged over the batches.
        polygraphy_passed: Polygraphy's verdict on all batches, by the tolerance's cosine and error;
            None where neither is demanded.
    """

    other: str
    metrics: LogitMetrics
    batch_cosine: float
    batch_max_error: float
    batch_mean_error: float
    polygraphy_passed: bool | None = None


class _Runner(BaseRunner):
    """A stage as Polygraphy wants it.

    Polygraphy's own runners bind a backend's tensors; this one binds what all our backends share,
    so that the same batches go in and `logits` come out everywhere.
    """

    def __init__(
        self, name: str, forward: _Forward, before: Callable[[], object], like: np.ndarray
    ) -> None:
        super().__init__(name=name)
        self._forward, self._before, self._like = forward, before, like

    def activate_impl(self) -> None:
        """Nothing: the session is open."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Batches of one type and rank; all lengths are free."""
        return TensorMetadata().add(_INPUT, self._like.dtype, (None,) * self._like.ndim)

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """`logits` of a batch."""
        self._before()
        start = time.perf_counter()
        logits = self._forward(feed_dict[_INPUT])
        self.inference_time = time.perf_counter() - start
        return OrderedDict({LOGITS: logits})

    def deactivate_impl(self) -> None:
        """Nothing: the session belongs to the caller."""


def _by_polygraphy(
    stage: StageLogits, other: StageLogits, demands: Tolerance, largest: float
) -> tuple[list, list]:
    """Polygraphy's results on errors and on cosines, one a batch; true where they pass.

    Args:
        stage: the one that is compared.
        other: the reference.
        demands: what is not demanded passes.
        largest: absolute logit of the reference, which relative errors are relative to.
    """
    limit, cosine = demands.max_relative_error, demands.min_cosine
    both = RunResults([*stage.results.lst, *other.results.lst])
    with _quiet_polygraphy():
        found = Comparator.compare_accuracy(
            both,
            compare_func=[
                SimpleCompareFunc(atol=math.inf if limit is None else limit * largest, rtol=0),
                CosineSimilarityCompareFunc(-1.0 if cosine is None else cosine),
            ],
        )
    pair = (stage.name, other.name)
    errors, cosines = ([iteration[LOGITS] for iteration in one[pair]] for one in found)
    return errors, cosines


@contextlib.contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy's messages off stdout, which belongs to the result; errors still raise.

    Quantiles of millions of logits, which only its messages have, take longer than to compare them.
    """
    unseen = patch.object(util, "str_output_stats", lambda *_: "", create=True)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), unseen:
        yield
