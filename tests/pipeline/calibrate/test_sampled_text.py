from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.calibrate import precision, sampled_text
from pipeline.calibrate.sampled_text import _drawn, sampled_windows
from pipeline.calibrate.text import load_tokens
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
    return sampled_windows(model, tokenizer, count=COUNT, length=LENGTH, seed=0)


def test_every_window_is_full(windows: torch.Tensor) -> None:
    assert windows.shape == (COUNT, LENGTH)
    assert windows.dtype == torch.int64


def test_the_seed_decides_the_text(
    windows: torch.Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    again, other = (
        sampled_windows(model, tokenizer, count=COUNT, length=LENGTH, seed=seed) for seed in (0, 1)
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
    sampled_windows(model, tokenizer, count=2, length=6, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_windows_are_as_short_as_asked(
    length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = sampled_windows(model, tokenizer, count=3, length=length, seed=0)
    assert windows.shape == (3, length)


def test_a_tokenizer_without_bos_begins_with_the_random_token(model: PreTrainedModel) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    windows = sampled_windows(model, tokenizer, count=COUNT, length=5, seed=0)
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
    repeated = sampled_windows(model, tokenizer, count=COUNT, length=LENGTH, seed=0)
    assert torch.equal(repeated, windows)


def without_cache(model: PreTrainedModel, rows: int, length: int, seed: int) -> torch.Tensor:
    """The text of the same draws, read anew from its beginning for every token."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.arange(256)
    first = words[torch.randint(256, (rows, 1), generator=generator)]
    windows = torch.cat([torch.full_like(first, 256), first], dim=1)
    while windows.shape[1] < length:
        with torch.no_grad():
            logits = model(input_ids=windows, use_cache=False).logits[:, -1, :256]
        new = _drawn(logits.double().softmax(dim=-1), generator)
        windows = torch.cat([windows, new], dim=1)
    return windows


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_text_is_what_the_model_says_without_a_cache(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(family)
    expected = without_cache(model, 3, 24, seed=4)
    assert torch.equal(sampled_windows(model, tokenizer, count=3, length=24, seed=4), expected)


@pytest.mark.parametrize("block", [1, 2, 4, 256])
def test_words_are_drawn_as_often_as_their_chances_say(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_text, "_WORDS_AT_ONCE", block)
    chances = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0]) / 8
    drawn = _drawn(chances.expand(8000, -1), torch.Generator().manual_seed(0)).flatten()
    # Four standard deviations of a count of 8000 draws.
    expected = 8000 * chances
    misses = (drawn.bincount(minlength=6) - expected).abs()
    assert (misses <= 4 * (expected * (1 - chances)).sqrt()).all()


def test_no_draw_is_of_a_word_without_a_chance_whatever_was_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chances = torch.zeros(4, 600)
    chances[:, 300], chances[:, 310] = 1e-30, 3.0
    shares = torch.tensor([[0.0], [0.5], [1 - 2**-53], [1.0]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: shares)
    assert _drawn(chances, torch.Generator()).flatten().tolist() == [300, 310, 310, 310]


@pytest.mark.parametrize("has_units", [False, True])
def test_text_says_whether_products_were_rounded_where_that_is_faster(
    has_units: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast,
    windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: has_units)
    batch = load_tokens("self", tokenizer, model, count=COUNT, length=LENGTH, seed=0)
    assert batch.details["text"].endswith("products in bfloat16") is has_units
    assert torch.equal(batch.tokens, windows) is not has_units
