from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import MAX_LENGTH, VOCAB_SIZE, tiny_llama
from validate.perplexity import CHUNK_TOKENS, measure_perplexity


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
