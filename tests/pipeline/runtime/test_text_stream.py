from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.runtime.text_stream import TextStream, _Detokenizer, _StopStrings
from tests.support.tiny_decoder import byte_tokenizer

TEXTS = ["plain words", "naïve café", "日本語のテキスト", "🐋 and 👩‍👩‍👧", " leading and  double"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_no_piece_is_broken(text: str) -> None:
    tokenizer = byte_tokenizer()
    detokenizer = _Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_a_character_appears_as_soon_as_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = _Detokenizer(tokenizer)
    assert [detokenizer.push(token) for token in tokenizer.encode("aéb")] == ["a", "", "é", "b"]


def test_a_character_cut_off_at_the_end_is_shown_as_broken() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = _Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode("a🐋")[:-1]]
    assert "".join(pieces) == "a"
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens of their own beside words, as sentencepiece makes them."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁a", "\N{REPLACEMENT CHARACTER}"]
    model = models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_ids(kind: str, content: bytes) -> list[int]:
    if kind == "fallback":
        return list(content)
    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [order.index(byte_symbol(byte)) for byte in content]


def byte_symbol(byte: int) -> str:
    """The letter by which byte-level tokenizers write a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return chr(byte) if byte in plain else chr(256 + others.index(byte))


BROKEN = [
    b"\x80" * 40,
    b"\xe4\xb8" * 20,
    b"\xf0\x9f\x90" * 20,
    b"\xff" * 5 + "日本🐋語".encode() * 3 + b"\xff" * 9,
    b"ab\xf0\x9f" + "🐋 whale".encode(),
]


@pytest.mark.parametrize("kind", ["level", "fallback"])
@pytest.mark.parametrize("content", BROKEN)
def test_bytes_that_never_become_a_character_are_held_back_for_three_tokens(
    kind: str, content: bytes
) -> None:
    tokenizer = byte_tokenizer() if kind == "level" else byte_fallback_tokenizer()
    detokenizer = _Detokenizer(tokenizer)
    ids, pieces = byte_ids(kind, content), list[str]()
    for number, token in enumerate(ids, 1):
        pieces.append(detokenizer.push(token))
        assert len("".join(pieces)) >= len(tokenizer.decode(ids[: max(0, number - 3)])) // 4
        assert len(ids[detokenizer._window : number]) <= 10
    text = "".join(pieces) + detokenizer.finish()
    if kind == "level":
        assert text == content.decode(errors="replace")
    else:  # better than the decoder, which breaks whole characters beside broken bytes
        whole = "".join(letter for letter in content.decode(errors="ignore"))
        assert text.replace("\N{REPLACEMENT CHARACTER}", "") == whole


def test_tokens_without_text_do_not_pile_up() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = _Detokenizer(tokenizer)
    end = tokenizer.eos_token_id
    pieces = [detokenizer.push(token) for token in [*tokenizer.encode("a"), *[end] * 50]]
    assert "".join(pieces) + detokenizer.push(tokenizer.encode("b")[0]) == "ab"
    assert len(detokenizer._ids) - detokenizer._window < 10


def test_a_stop_string_behind_broken_bytes_ends_the_text() -> None:
    tokenizer = byte_tokenizer()
    text = TextStream(tokenizer, ["\N{REPLACEMENT CHARACTER}" * 2])
    pushed = [text.push(token) for token in byte_ids("level", b"x" + b"\x80" * 9)]
    assert text.has_stopped
    assert "".join(pushed) == "x"


def stream(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    watcher = _StopStrings(stops)
    passed = "".join(watcher.push(piece) for piece in pieces)
    return passed + watcher.finish(), watcher.found


def test_a_stop_string_may_span_several_pieces() -> None:
    assert stream(["one E", "N", "D two"], ["END"]) == ("one ", "END")


def test_text_that_only_looks_like_a_start_is_passed_on() -> None:
    watcher = _StopStrings(["END"])
    assert watcher.push("an EN") == "an "
    assert watcher.push("ORMOUS") == "ENORMOUS"
    assert watcher.found is None


def test_what_is_held_back_comes_out_at_the_end() -> None:
    assert stream(["an EN"], ["END"]) == ("an EN", None)


def test_nothing_comes_after_a_stop_string() -> None:
    watcher = _StopStrings(["."])
    assert watcher.push("One. Two.") == "One"
    assert watcher.push("Three") == ""
    assert watcher.finish() == ""


@pytest.mark.parametrize("stops", [["b", "abc"], ["abc", "b"]])
def test_the_stop_string_that_begins_first_wins(stops: list[str]) -> None:
    assert stream(["xab", "cd"], stops) == ("x", "abc")


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert _StopStrings().push("text") == "text"
    assert _StopStrings([""]).push("text") == "text"


@given(
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_stream_is_cut_where_the_whole_text_would_be(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    places = [text.find(stop) for stop in stops if stop in text]
    passed, found = stream(pieces, stops)
    assert passed == (text[: min(places)] if places else text)
    assert (found is None) == (not places)
