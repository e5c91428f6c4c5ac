from __future__ import annotations

import pytest

from pipeline.runtime.detokenize import Detokenizer
from tests.tiny_decoder import byte_tokenizer

TEXTS = ["plain words", "naïve café", "日本語のテキスト", "🐋 and 👩‍👩‍👧", " leading and  double"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_no_piece_is_broken(text: str) -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_character_appears_as_soon_as_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in tokenizer.encode("aéb")] == ["a", "", "é", "b"]


def test_a_character_cut_off_at_the_end_is_shown_as_broken() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode("a🐋")[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"
