"""Stop strings cut a stream where they would cut the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.stop import StopStrings


def stream(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    watcher = StopStrings(stops)
    passed = "".join(watcher.push(piece) for piece in pieces)
    return passed + watcher.finish(), watcher.found


def test_a_stop_string_may_span_several_pieces() -> None:
    assert stream(["one E", "N", "D two"], ["END"]) == ("one ", "END")


def test_text_that_only_looks_like_a_start_is_passed_on() -> None:
    watcher = StopStrings(["END"])
    assert watcher.push("an EN") == "an "
    assert watcher.push("ORMOUS") == "ENORMOUS"
    assert watcher.found is None


def test_what_is_held_back_comes_out_at_the_end() -> None:
    assert stream(["an EN"], ["END"]) == ("an EN", None)


def test_nothing_comes_after_a_stop_string() -> None:
    watcher = StopStrings(["."])
    assert watcher.push("One. Two.") == "One"
    assert watcher.push("Three") == ""
    assert watcher.finish() == ""


@pytest.mark.parametrize("stops", [["b", "abc"], ["abc", "b"]])
def test_the_stop_string_that_begins_first_wins(stops: list[str]) -> None:
    assert stream(["xab", "cd"], stops) == ("x", "abc")


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert StopStrings().push("text") == "text"
    assert StopStrings([""]).push("text") == "text"


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
