from __future__ import annotations

import hashlib
import itertools
import random
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.calibrate.text import TokenBatch, _tokenize, load_tokens
from pipeline.errors import InputError, MissingPackageError
from tests.support.families import tiny_model
from tests.support.tiny_decoder import byte_tokenizer

LENGTH = 10
TEXT = "".join(random.Random(0).choices(string.ascii_letters, k=995))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def take(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> Any:
    """Windows of a text file."""

    def load(text: str = TEXT, count: int = 8, seed: int = 0, **settings: Any) -> TokenBatch:
        path = tmp_path / "text.txt"
        path.write_text(text, encoding="utf-8")
        return load_tokens(
            str(path), tokenizer, model, count=count, length=LENGTH, seed=seed, **settings
        )

    return load


def places(batch: TokenBatch, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Where in TEXT each window begins; ten random letters occur once."""
    return [TEXT.index(tokenizer.decode(window)) for window in batch.tokens]


def test_windows_are_pieces_of_the_text_that_do_not_overlap(
    take: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = take(count=60)
    assert batch.tokens.shape == (60, LENGTH)
    assert batch.tokens.dtype == torch.int64
    starts = sorted(places(batch, tokenizer))
    assert all(b - a >= LENGTH for a, b in itertools.pairwise(starts))


def test_all_windows_that_fit_can_be_taken(take: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert places(take(count=99), tokenizer) == list(range(0, 990, LENGTH))


def test_the_seed_decides_which_windows_are_taken(
    take: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert places(take(seed=1), tokenizer) == places(take(seed=1), tokenizer)
    assert places(take(seed=1), tokenizer) != places(take(seed=2), tokenizer)
    assert take(seed=1).describe() == take(seed=1).describe()
    assert take(seed=1).describe()["sha256"] != take(seed=2).describe()["sha256"]


@pytest.mark.parametrize("seed", [0, 1])
def test_sequential_windows_are_the_first_in_order_whatever_the_seed(
    take: Any, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    batch = take(count=5, seed=seed, sequential=True)
    assert places(batch, tokenizer) == [0, 10, 20, 30, 40]


def test_a_text_that_is_too_short_says_how_much_is_needed(take: Any) -> None:
    with pytest.raises(
        InputError, match=r"(?s)too short.*995 tokens, 99 windows of 10.*1000 tokens"
    ):
        take(count=100)


def test_an_empty_text_is_too_short(take: Any) -> None:
    with pytest.raises(InputError, match="0 tokens"):
        take(text="", count=1)


def test_the_description_identifies_source_and_tokens(take: Any) -> None:
    batch = take()
    tokens = batch.tokens.numpy().astype("<i8").tobytes()
    assert batch.describe() == {
        "source": "text.txt",  # not where it lies: the record travels
        "seed": 0,
        "details": {"file": "text.txt", "file_sha256": hashlib.sha256(TEXT.encode()).hexdigest()},
        "windows": 8,
        "window_length": LENGTH,
        "tokens": 80,
        "sha256": hashlib.sha256(tokens).hexdigest(),
    }


def test_the_file_hash_is_that_of_its_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"one\r\ntwo\r\nthree\r\n")
    batch = load_tokens(str(path), tokenizer, model, count=1, length=5, seed=0, sequential=True)
    assert batch.details["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer.decode(batch.tokens[0]) == "one\nt"


def test_a_file_that_is_missing_is_named(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, tmp_path: Path
) -> None:
    for spec in (str(tmp_path / "no.txt"), str(tmp_path), "myself", "wikitext2+c5", ""):
        with pytest.raises(InputError, match=r"(?s)cannot be read.*'self', or 'wikitext2\+c4'"):
            load_tokens(spec, tokenizer, model, count=1, length=4, seed=0)


def test_a_file_that_is_not_utf8_is_refused(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("d\u00e9j\u00e0 vu".encode("latin-1"))
    with pytest.raises(InputError, match=r"(?s)cannot be read.*latin1\.txt.*UTF-8"):
        load_tokens(str(path), tokenizer, model, count=1, length=4, seed=0)


def test_a_hub_dataset_without_network_or_package_says_what_to_do(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    with pytest.raises((InputError, MissingPackageError), match=r"network|EXTRAS=hub"):
        load_tokens("wikitext2+c4", tokenizer, model, count=1, length=4, seed=0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("the <unk> cat", "the cat"),
        (" the <unk> <unk> cat <unk>\n", " the cat\n"),
        ("<unk> cat", " cat"),
        ("line\n<unk> cat", "line\n cat"),
        ("no mark", "no mark"),
    ],
)
def test_masked_words_are_left_out(
    text: str, kept: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert tokenizer.decode(_tokenize(text, tokenizer)) == kept


def test_no_special_tokens_are_added_to_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert _tokenize("abc", tokenizer).shape == (3,)
    assert _tokenize("", tokenizer).dtype == torch.int64


def test_text_of_the_model_itself_is_recorded_as_such(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    batches = [
        load_tokens("self", tokenizer, model, count=2, length=8, seed=seed) for seed in (3, 3, 4)
    ]
    same, again, other = (batch.describe() for batch in batches)
    assert same == again
    assert same["sha256"] != other["sha256"]
    assert (same["source"], same["windows"], same["window_length"]) == ("self", 2, 8)


def test_a_mixture_takes_as_much_of_every_part_and_spreads_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    for name, letter in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(letter * 500)
    spec = f"{tmp_path / 'a.txt'}+{tmp_path / 'b.txt'}"
    batch = load_tokens(spec, tokenizer, model, count=9, length=LENGTH, seed=0)
    letters = [tokenizer.decode(window)[0] for window in batch.tokens]
    assert sorted(letters) == ["a"] * 5 + ["b"] * 4
    assert all(set(pair) == {"a", "b"} for pair in itertools.pairwise(letters))
    entry = batch.describe()
    assert entry["source"] == "a.txt+b.txt"
    assert "a.txt" in str(entry["details"])


def test_a_mixture_with_a_part_that_is_not_there_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_tokens("self+missing.txt", tokenizer, model, count=2, length=LENGTH, seed=0)
