from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import MAX_LENGTH, VOCAB_SIZE, tiny_llama
from validate.metrics import LogitMetrics
from validate.quality import CHUNK_TOKENS, measure_perplexity, measure_quality

LENGTH = CHUNK_TOKENS + 20  # two chunks, the second one shorter


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, LENGTH))


def test_a_session_alone_has_its_perplexity_and_nothing_else(windows: np.ndarray) -> None:
    session = TorchSession(tiny_llama())
    quality = measure_quality(session, None, windows)
    assert quality.window_nlls == pytest.approx(measure_perplexity(session, windows).window_nlls)
    assert quality.reference_nlls == quality.window_kls == quality.window_agreements == []
    assert quality.kl is None
    assert quality.top1 is None


def test_closeness_equals_that_of_all_logits_at_once(windows: np.ndarray) -> None:
    own, other = TorchSession(tiny_llama(0)), TorchSession(tiny_llama(1))
    quality = measure_quality(own, other, windows)
    logits = []
    for session in (other, own):
        session.reset()
        logits.append(session.forward(windows[:, :-1]))
    expected = LogitMetrics.of(*logits)
    assert quality.kl == pytest.approx(expected.kl_mean, rel=1e-5)  # float32 logits
    assert quality.top1 == pytest.approx(expected.top1_agreement)
    assert quality.window_nlls == pytest.approx(measure_perplexity(own, windows).window_nlls)
    assert quality.reference_nlls == pytest.approx(measure_perplexity(other, windows).window_nlls)


def test_a_model_agrees_with_itself(windows: np.ndarray) -> None:
    told: list[str] = []
    sessions = TorchSession(tiny_llama()), TorchSession(tiny_llama())
    quality = measure_quality(*sessions, windows, told.append)
    assert quality.kl == pytest.approx(0, abs=1e-12)
    assert quality.top1 == 1
    assert len(told) == len(windows)


def test_perplexity_by_chunks_equals_the_models_own_loss() -> None:
    windows = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, CHUNK_TOKENS + 20))
    model = tiny_llama()
    tokens = torch.from_numpy(windows)
    with torch.inference_mode():
        losses = [model(window[None], labels=window[None]).loss.item() for window in tokens]
    result = measure_perplexity(TorchSession(model), windows)
    np.testing.assert_allclose(result.window_nlls, losses, rtol=1e-5)
    assert result.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert result.tokens == 3 * (CHUNK_TOKENS + 19)


def test_a_window_longer_than_the_cache_is_refused() -> None:
    with pytest.raises(InputError, match="Too many tokens"):
        measure_perplexity(
            TorchSession(tiny_llama()), np.zeros((1, MAX_LENGTH + 2), dtype=np.int64)
        )
