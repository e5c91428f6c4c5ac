"""How far two sets of logits are apart: pure functions on arrays.

Everything is computed in float64, a few tokens at a time: an array of logits [512, 49152] never
exists in float64 as a whole, and what is computed of a token stays in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK_NUMBERS = 1 << 18


@dataclass(frozen=True)
class LogitMetrics:
    """Logits of one stage against those of another, over N tokens.

    Attributes:
        tokens: N.
        min_cosine: of the tokens' logit vectors, the worst.
        mean_cosine: the same, on average.
        max_error: largest absolute difference of a logit.
        mean_error: mean absolute difference of a logit.
        relative_error: `max_error` over the largest absolute logit of the reference.
        kl_mean: KL(reference || stage) per token, nats.
        kl_max: the same of the worst token.
        top1_agreement: fraction of tokens whose likeliest next token is the same.
        is_finite: no NaN and no infinity in the stage's logits.
    """

    tokens: int
    min_cosine: float
    mean_cosine: float
    max_error: float
    mean_error: float
    relative_error: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    is_finite: bool

    @classmethod
    def of(cls, reference: np.ndarray, stage: np.ndarray) -> LogitMetrics:
        """All metrics of two arrays of logits.

        Args:
            reference: float [..., V].
            stage: float [..., V], the same shape.

        Raises:
            ValueError: the shapes differ, or there is no token.
        """
        if reference.shape != stage.shape or reference.size == 0:
            raise ValueError(f"logits {reference.shape} against {stage.shape}")
        reference = reference.reshape(-1, reference.shape[-1])  # [N, V]
        stage = stage.reshape(-1, stage.shape[-1])  # [N, V]
        with np.errstate(invalid="ignore"):  # NaN and infinities are reported, not warned about
            cosines = _cosine_per_token(reference, stage)
            divergences = kl_per_token(reference, stage)
            max_errors, mean_errors = _error_per_token(reference, stage)
        return cls(
            tokens=len(reference),
            min_cosine=float(cosines.min()),
            mean_cosine=float(cosines.mean()),
            max_error=float(max_errors.max()),
            mean_error=float(mean_errors.mean()),
            relative_error=float(max_errors.max() / np.abs(reference).max()),
            kl_mean=float(divergences.mean()),
            kl_max=float(divergences.max()),
            top1_agreement=_top1_agreement(reference, stage),
            is_finite=bool(np.isfinite(stage).all()),
        )


def _cosine_per_token(reference: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """Cosine of the angle between each pair of rows.

    Args:
        reference: float [N, V].
        stage: float [N, V].

    Returns:
        float64 [N]; NaN where a row is all zeros.
    """

    def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (a * b).sum(axis=-1) / norms

    return _by_blocks(cosines, reference, stage)


def _error_per_token(reference: np.ndarray, stage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest and mean absolute difference within each pair of rows of float [N, V].

    Returns:
        Two float64 [N].
    """

    def errors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        difference = np.abs(a - b)
        return np.stack([difference.max(axis=-1), difference.mean(axis=-1)], axis=-1)

    both = _by_blocks(errors, reference, stage)  # [N, 2]
    return both[:, 0], both[:, 1]


def kl_per_token(original: np.ndarray, stage: np.ndarray) -> np.ndarray:
    """KL(original || stage) of the two next-token distributions.

    Args:
        original: float [N, V], logits.
        stage: float [N, V], logits.

    Returns:
        float64 [N], nats; at least 0 up to rounding.
    """

    def divergences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        shifted, exponentials, sums = _exponentials(a)
        others, _, other_sums = _exponentials(b)
        log_ratios = shifted - others - np.log(sums / other_sums)
        return (exponentials / sums * log_ratios).sum(axis=-1)

    return _by_blocks(divergences, original, stage)


def _top1_agreement(reference: np.ndarray, stage: np.ndarray) -> float:
    """Fraction of the rows of two float [N, V] whose largest entry is at the same place."""
    return float((reference.argmax(axis=-1) == stage.argmax(axis=-1)).mean())


def nll_per_token(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each target.

    Args:
        logits: float [N, V].
        targets: int64 [N].

    Returns:
        float64 [N], nats.
    """
    blocks = []
    for part in _blocks_of(logits):
        shifted, _, sums = _exponentials(logits[part].astype(np.float64))
        own = np.take_along_axis(shifted, targets[part, None], axis=-1)
        blocks.append((np.log(sums) - own)[:, 0])
    return np.concatenate(blocks)


def perplexity_with_error(window_nlls: np.ndarray) -> tuple[float, float | None]:
    """Perplexity and its standard error.

    Tokens of one window depend on each other, so the error of the mean NLL is that of the windows'
    means; the delta method carries it over: SE(exp m) = exp(m) SE(m).

    Args:
        window_nlls: float64 [W], mean NLL of each window; all windows equally long.

    Returns:
        Perplexity, and its standard error; None for the error of a single window.
    """
    perplexity = float(np.exp(window_nlls.mean()))
    if len(window_nlls) < 2:
        return perplexity, None
    return perplexity, perplexity * standard_error(window_nlls)


def log_perplexity_change(
    reference_nlls: np.ndarray, stage_nlls: np.ndarray
) -> tuple[float, float | None]:
    """Change of the log-perplexity on the same windows, with its paired standard error.

    Args:
        reference_nlls: float64 [W], mean NLL of each window.
        stage_nlls: float64 [W].

    Returns:
        log(stage perplexity / reference perplexity), and its standard error; None for the error of
        a single window.
    """
    changes = stage_nlls - reference_nlls
    return float(changes.mean()), standard_error(changes) if len(changes) > 1 else None


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of float64 [N], N at least 2."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _exponentials(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [N, V] less the largest of their row, exponentials, and sums of these [N, 1]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    return shifted, exponentials, exponentials.sum(axis=-1, keepdims=True)


def _by_blocks(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray],
    reference: np.ndarray,
    stage: np.ndarray,
) -> np.ndarray:
    """Apply a row-wise function to float64 copies of a few rows at a time: [N, V] twice."""
    return np.concatenate(
        [
            function(reference[part].astype(np.float64), stage[part].astype(np.float64))
            for part in _blocks_of(reference)
        ]
    )


def _blocks_of(logits: np.ndarray) -> Iterator[slice]:
    """Slices that cover the rows of [N, V], each of _BLOCK_NUMBERS numbers at most, or one row."""
    rows = max(1, _BLOCK_NUMBERS // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))
