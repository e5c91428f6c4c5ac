"""How a benchmark ends, and how it drives an engine in a process of its own."""

from __future__ import annotations

import sys

import click
import pytest

from benchmarks.command import run
from benchmarks.cpu.generation import Engine
from pipeline.errors import InputError

ECHO = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps({"heard": json.loads(line)}), flush=True)
"""


def ended(monkeypatch: pytest.MonkeyPatch, failure: BaseException | None) -> int:
    """The status of a command that does nothing, or fails so."""

    @click.command()
    def command() -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr(sys, "argv", ["benchmark"])
    return run(command)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (None, 0),
        (click.exceptions.Exit(7), 7),
        (click.UsageError("no such row"), 2),
        (InputError("No text."), 3),
        (MemoryError(), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_end_with_the_status_of_skipcat(
    monkeypatch: pytest.MonkeyPatch, failure: BaseException | None, status: int
) -> None:
    assert ended(monkeypatch, failure) == status


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        ended(monkeypatch, ZeroDivisionError())


def test_an_engine_answers_and_starts_again() -> None:
    engine = Engine("echo", [sys.executable, "-c", ECHO], ours=True)
    for _ in range(2):
        assert engine.start() > 0
        assert engine.ask(do="score", ids=[1, 2]) == {"heard": {"do": "score", "ids": [1, 2]}}
        assert engine.peak_bytes() > 0
        engine.stop()
        engine.stop()


def test_an_engine_that_ends_is_named() -> None:
    engine = Engine("llama.cpp", [sys.executable, "-c", "import sys; sys.exit(9)"], ours=False)
    with pytest.raises(click.ClickException, match=r"llama\.cpp ended \(status 9\)"):
        engine.start()
    engine.stop()
