from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from pipeline import progress


def test_items_come_through_unchanged_and_stdout_stays_empty(
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = [object(), object()]
    assert list(progress.track(items, "work")) == items
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "", "less than twenty seconds deserve no line"


@pytest.mark.parametrize(("total", "shown"), [(None, "?"), (3, "3")])
def test_lines_say_how_many_are_done(
    total: int | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    assert list(progress.track(iter("abc"), "compress", total)) == list("abc")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        f"compress: {done} of {shown}" for done in range(3)
    ]
    assert [", under a minute left" in line for line in lines] == [
        total is not None and done > 0 for done in range(3)
    ]


@pytest.mark.parametrize(
    ("seconds", "done", "total", "says"),
    [(0, 0, 9, ""), (60, 3, None, ""), (60, 3, 12, ", about 3 min left"), (60, 9, 12, ", under")],
)
def test_the_rest_takes_as_long_as_what_is_done(
    seconds: float, done: int, total: int | None, says: str
) -> None:
    assert progress._time_left(seconds, done, total).startswith(says)
    assert bool(progress._time_left(seconds, done, total)) == bool(says)


def test_quiet_hides_progress_and_no_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(progress, "_hidden", False)
    progress.hide_progress(True)
    with progress.waiting("loading"):
        assert list(progress.track("ab", "x")) == ["a", "b"]
    progress.note("a fallback")
    assert capsys.readouterr().err == "a fallback\n"


def test_a_sized_collection_counts_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)
    list(progress.track("ab", "x"))
    assert "1 of 2" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "_console", lambda: terminal)
    assert list(progress.track([1, 2, 3], "compress")) == [1, 2, 3]
    assert "compress" in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert capsys.readouterr().out == ""


def test_items_are_taken_one_at_a_time() -> None:
    taken = []

    def source() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number

    for number in progress.track(source(), "work"):
        assert taken[-1] == number


def test_a_note_is_shown_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    message = "layers [3] of [bold]x[/bold]: " + "long " * 60 + "end"
    progress.note(message)
    captured = capsys.readouterr()
    assert captured.err == message + "\n"
    assert captured.out == ""
