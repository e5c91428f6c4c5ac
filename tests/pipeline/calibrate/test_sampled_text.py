from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.calibrate.text import _generate_windows
from tests.support.families import tiny_model
from tests.support.tiny_decoder import byte_tokenizer

COUNT, LENGTH = 8, 40


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    return _generate_windows(model, tokenizer, count=COUNT, length=LENGTH, seed=0)


def test_every_window_is_full(windows: torch.Tensor) -> None:
    assert windows.shape == (COUNT, LENGTH)
    assert windows.dtype == torch.int64


def test_the_seed_decides_the_text(
    windows: torch.Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    again, other = (
        _generate_windows(model, tokenizer, count=COUNT, length=LENGTH, seed=seed)
        for seed in (0, 1)
    )
    assert torch.equal(again, windows)
    assert not torch.equal(other, windows)


def test_windows_begin_with_bos_and_then_differ(windows: torch.Tensor) -> None:
    assert (windows[:, 0] == 256).all()
    assert len(set(windows[:, 1].tolist())) > 1
    assert len({tuple(window.tolist()) for window in windows}) == COUNT


def test_no_token_after_bos_is_special_or_unknown_to_the_tokenizer(windows: torch.Tensor) -> None:
    # The model has 272 logits and the tokenizer 256 bytes and two special tokens: of 300 tokens
    # sampled freely, about 18 would be others.
    assert windows[:, 1:].max() < 256


def test_the_random_state_of_the_caller_is_left_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _generate_windows(model, tokenizer, count=2, length=6, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_windows_are_as_short_as_asked(
    length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = _generate_windows(model, tokenizer, count=3, length=length, seed=0)
    assert windows.shape == (3, length)


def test_a_tokenizer_without_bos_begins_with_the_random_token(model: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    windows = _generate_windows(model, tokenizer, count=COUNT, length=5, seed=0)
    assert windows.shape == (COUNT, 5)
    assert windows[:, 0].max() < 256


def test_the_sampling_advice_of_the_model_is_ignored(
    windows: torch.Tensor, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Qwen and others publish a generation_config.json for chat, which would narrow the text.
    model = tiny_model("llama")
    config = model.generation_config
    config.temperature, config.top_k, config.top_p = 0.1, 2, 0.5
    config.repetition_penalty = 1.3
    config.min_p, config.no_repeat_ngram_size, config.num_beams = 0.5, 2, 2
    repeated = _generate_windows(model, tokenizer, count=COUNT, length=LENGTH, seed=0)
    assert torch.equal(repeated, windows)
