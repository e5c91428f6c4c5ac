from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.runtime.generate import answer, generate
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import MAX_LENGTH, byte_tokenizer, tiny_llama

PROMPT = [5, 6, 7, 8]


def test_greedy_equals_transformers_generate() -> None:
    model = tiny_llama()
    expected = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert (
        list(generate(TorchSession(model), PROMPT, Decoding(20)))
        == expected[0, len(PROMPT) :].tolist()
    )


@pytest.mark.parametrize("profile", ["opset24", "compat"])
def test_onnx_writes_what_torch_writes(exports: dict[str, Path], profile: str) -> None:
    expected = list(generate(TorchSession(tiny_llama()), PROMPT, Decoding(40)))
    assert list(generate(OnnxSession(exports[profile]), PROMPT, Decoding(40))) == expected


def test_a_seed_fixes_the_sample() -> None:
    session, how = TorchSession(tiny_llama()), Sampling(temperature=2.0, top_k=20)

    def sample(seed: int) -> list[int]:
        return list(generate(session, PROMPT, Decoding(20, how, seed=seed)))

    assert sample(1) == sample(1) != sample(2)


def test_it_ends_before_a_stop_id() -> None:
    session = TorchSession(tiny_llama())
    free = list(generate(session, PROMPT, Decoding(20)))
    stop = free[5]
    assert (
        list(generate(session, PROMPT, Decoding(20, stop_ids={stop}))) == free[: free.index(stop)]
    )


def test_it_ends_when_the_cache_is_full() -> None:
    tokens = list(generate(TorchSession(tiny_llama(), max_length=10), PROMPT, Decoding(100)))
    assert len(tokens) == 10 - len(PROMPT) + 1  # the last one needs no place in the cache


def test_an_empty_or_too_long_prompt_is_refused() -> None:
    session = TorchSession(tiny_llama())
    with pytest.raises(InputError, match="empty"):
        next(generate(session, [], Decoding(1)))
    with pytest.raises(InputError, match="Too many tokens"):
        next(generate(session, [1] * (MAX_LENGTH + 1), Decoding(1)))


@pytest.mark.parametrize(
    ("max_length", "max_new_tokens", "ended"), [(100, 6, "length"), (10, 60, "context")]
)
def test_an_answer_says_why_it_ended(max_length: int, max_new_tokens: int, ended: str) -> None:
    pieces: list[str] = []
    tokenizer = byte_tokenizer()
    session = TorchSession(tiny_llama(), max_length=max_length)
    result = answer(session, tokenizer, PROMPT, Decoding(max_new_tokens), pieces.append)
    ids = list(generate(session, PROMPT, Decoding(max_new_tokens)))
    assert result.ended == ended
    assert result.new_tokens == len(ids)
    assert result.text == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
