from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from torch.nn import functional

from validate.metrics import (
    LogitMetrics,
    _cosine_per_token,
    kl_per_token,
    log_perplexity_change,
    nll_per_token,
    perplexity_with_error,
)

# More rows than one block, so that the seams are tested too.
ROWS, VOCAB = 150, 40


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(ROWS, VOCAB)).astype(np.float32) * 5
    return reference, reference + generator.normal(size=reference.shape).astype(np.float32)


def test_cosine_equals_scipys(pair: tuple[np.ndarray, np.ndarray]) -> None:
    wide = [array.astype(np.float64) for array in pair]
    expected = [1 - scipy.spatial.distance.cosine(a, b) for a, b in zip(*wide, strict=True)]
    np.testing.assert_allclose(_cosine_per_token(*pair), expected, rtol=1e-12)


def test_kl_equals_scipys_relative_entropy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    p, q = (scipy.special.softmax(array.astype(np.float64), axis=-1) for array in pair)
    expected = scipy.special.rel_entr(p, q).sum(axis=-1)
    np.testing.assert_allclose(kl_per_token(*pair), expected, rtol=1e-9)


def test_kl_ignores_a_constant_added_to_all_logits(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference = pair[0].astype(np.float64)
    np.testing.assert_allclose(kl_per_token(reference, reference + 1000), 0, atol=1e-10)


def test_nll_equals_torchs_cross_entropy(pair: tuple[np.ndarray, np.ndarray]) -> None:
    targets = np.random.default_rng(1).integers(0, VOCAB, ROWS)
    expected = functional.cross_entropy(
        torch.from_numpy(pair[0]).double(), torch.from_numpy(targets), reduction="none"
    )
    np.testing.assert_allclose(nll_per_token(pair[0], targets), expected.numpy(), rtol=1e-12)


def test_all_metrics_equal_plain_formulas(pair: tuple[np.ndarray, np.ndarray]) -> None:
    reference, stage = (array.astype(np.float64) for array in pair)
    metrics = LogitMetrics.of(*(array.reshape(3, 50, VOCAB) for array in pair))
    difference = np.abs(stage - reference)
    assert metrics.tokens == ROWS
    assert metrics.max_error == difference.max()
    assert metrics.mean_error == pytest.approx(difference.mean())
    assert metrics.relative_error == pytest.approx(difference.max() / np.abs(reference).max())
    assert metrics.top1_agreement == (reference.argmax(-1) == stage.argmax(-1)).mean()
    assert 0 < metrics.top1_agreement < 1
    assert metrics.min_cosine < metrics.mean_cosine
    assert metrics.is_finite


def test_equal_logits_have_no_distance(pair: tuple[np.ndarray, np.ndarray]) -> None:
    metrics = LogitMetrics.of(pair[0], pair[0])
    assert metrics.min_cosine == pytest.approx(1, abs=1e-14)
    assert metrics.max_error == metrics.kl_max == 0
    assert metrics.top1_agreement == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_logit_is_seen(pair: tuple[np.ndarray, np.ndarray], bad: float) -> None:
    pair[1][70, 3] = bad
    metrics = LogitMetrics.of(*pair)
    assert not metrics.is_finite
    assert not metrics.min_cosine >= 0


def test_different_shapes_are_refused(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="against"):
        LogitMetrics.of(pair[0], pair[1][:-1])


def test_perplexity_error_equals_the_spread_of_repeated_measurements() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(3.0, 0.2, size=(4000, 25))
    results = [perplexity_with_error(sample) for sample in samples]
    spread = np.std([value for value, _ in results])
    claimed = np.mean([error for _, error in results if error is not None])
    assert claimed == pytest.approx(spread, rel=0.05)


def test_error_of_the_mean_equals_scipys() -> None:
    nlls = np.random.default_rng(0).normal(3.0, 0.2, 10)
    perplexity, error = perplexity_with_error(nlls)
    assert perplexity == pytest.approx(np.exp(nlls.mean()))
    assert error == pytest.approx(perplexity * scipy.stats.sem(nlls))


def test_one_window_has_no_error() -> None:
    assert perplexity_with_error(np.array([2.0]))[1] is None
    assert log_perplexity_change(np.array([2.0]), np.array([2.5])) == (0.5, None)


def test_pairing_removes_the_spread_between_windows() -> None:
    nlls = np.random.default_rng(0).normal(3.0, 1.0, 20)
    change, error = log_perplexity_change(nlls, nlls + 0.1)
    assert change == pytest.approx(0.1)
    assert error == pytest.approx(0, abs=1e-12)
