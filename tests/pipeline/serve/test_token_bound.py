"""The bound never exceeds the tokens that a text has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pipeline.serve.prompt import _TokenBound

_TEXT = "the whale, the whale; he the e\u0301 \u1f82 ...    and    and\n\n" * 4


def trained(*splitters: Any, normalizer: Any = None, added: Any = ()) -> Any:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitters, byte_level])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


BOUNDED = {
    "bytes": trained(),
    "split": trained(pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.Digits()),
    "composing": trained(normalizer=normalizers.NFC()),
    "replacing": trained(normalizer=normalizers.Sequence([normalizers.Replace(" ", "_")])),
    "blanks": trained(added=[AddedToken("<end>", rstrip=True, lstrip=True)]),
}
UNBOUNDED = {
    "dropping": trained(pre_tokenizers.Whitespace()),
    "removing": trained(pre_tokenizers.Split(" ", "removed")),
    "stripping": trained(normalizer=normalizers.Strip()),
    "shrinking": trained(normalizer=normalizers.Replace("aa", "a")),
    "pattern": trained(normalizer=normalizers.Replace(Regex("a+"), "a")),
    "no bytes": Tokenizer(models.BPE()),
    "words": Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
    "fused": Tokenizer(models.BPE({"u": 0}, [], unk_token="u", fuse_unk=True)),
    "none": None,
}
_BOUNDS = {name: _TokenBound(tokenizer) for name, tokenizer in BOUNDED.items()}
_pieces = st.sampled_from(["the whale", "e\u0301", "\u1f80\u0300", "α\u0345\u0313\u0300", "    "])


@pytest.mark.parametrize("name", BOUNDED)
@given(st.lists(_pieces | st.text(max_size=5) | st.sampled_from(["<end>", "\n\n"])))
@settings(max_examples=50, deadline=None)
def test_no_text_has_fewer_tokens_than_the_bound(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert _BOUNDS[name].fewest_tokens(text) <= len(BOUNDED[name].encode(text).ids)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_bound_grows_with_the_text(name: str) -> None:
    assert _BOUNDS[name].fewest_tokens("whale" * 10_000) > 100


@pytest.mark.parametrize("name", UNBOUNDED)
def test_where_characters_may_vanish_there_is_none(name: str) -> None:
    assert _TokenBound(UNBOUNDED[name]).fewest_tokens("whale" * 10_000) == 0


def test_the_bound_of_a_long_text_of_blanks_beside_tokens_that_take_them_in() -> None:
    text = "<end>" + " " * 10_000
    assert _BOUNDS["blanks"].fewest_tokens(text) <= len(BOUNDED["blanks"].encode(text).ids) == 1
