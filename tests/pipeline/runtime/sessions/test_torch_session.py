from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import FAMILIES, tiny_model
from tests.support.tiny_decoder import MAX_LENGTH, VOCAB_SIZE, tiny_llama


def test_cached_decoding_equals_the_model_without_cache() -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 12))
    model = tiny_llama()
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    session = TorchSession(model)
    pieces = [session.forward(tokens[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 12))]
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=5e-5)
    session.reset()
    np.testing.assert_allclose(session.forward(tokens), expected, atol=5e-5)


def test_half_precision_still_answers_in_float32() -> None:
    logits = TorchSession(tiny_llama().to(torch.bfloat16)).forward(np.ones((1, 3), dtype=np.int64))
    assert logits.dtype == np.float32


def test_limits_come_from_the_model_unless_given() -> None:
    assert TorchSession(tiny_llama()).max_length == MAX_LENGTH
    session = TorchSession(tiny_llama(), max_length=4)
    with pytest.raises(InputError, match="at most 4"):
        session.forward(np.ones((1, 5), dtype=np.int64))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_sequence_goes_on_as_if_it_had_been_read_in_every_row(family: str) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 24))
    tokens[1:, :16] = tokens[0, :16]
    session = TorchSession(tiny_model(family))
    expected = session.forward(tokens)[:, 16:]
    session.reset()
    session.forward(tokens[:1, :16])
    session.repeat(3)
    np.testing.assert_allclose(session.forward(tokens[:, 16:]), expected, atol=5e-5)
    with pytest.raises(InputError, match="batch size"):
        session.repeat(2)
