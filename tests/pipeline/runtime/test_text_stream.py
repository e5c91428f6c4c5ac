from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.text_stream import _Detokenizer, _StopStrings
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
