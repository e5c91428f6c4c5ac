"""One answer at a time: a model that is used twice at once says so, or waits, and stays right."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.runtime.generate import generate
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session
from tests.support.tiny_decoder import shared_export

PROMPTS = ["hello", "hello there", "something else", "hello there again"]
HOW = Decoding(12)


@pytest.fixture(scope="module", params=["opset24", "cpu"])
def folder(request: pytest.FixtureRequest) -> Path:
    return shared_export(request.param)


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    return LanguageModel.open(folder)


def test_answers_of_several_threads_are_those_of_one(folder: Path, model: LanguageModel) -> None:
    alone = [LanguageModel.open(folder).generate(prompt, HOW).text for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: model.generate(prompt, HOW).text, PROMPTS * 3))
    assert together == alone * 3


def test_a_second_answer_beside_an_open_stream_is_refused_and_harms_neither(
    model: LanguageModel,
) -> None:
    expected = model.generate(PROMPTS[0], HOW).text
    first = model.stream(PROMPTS[0], HOW)
    pieces = list(islice(first, 3))
    for second in (lambda: next(model.stream(PROMPTS[1], HOW)), lambda: model.generate("x", HOW)):
        with pytest.raises(UsageError, match="in use"):
            second()
        with pytest.raises(UsageError, match="in use"), ThreadPoolExecutor(1) as pool:
            pool.submit(second).result()
    assert "".join([*pieces, *first]) == expected


def test_an_answer_within_an_answer_is_refused(model: LanguageModel) -> None:
    def emit(text: str) -> None:
        model.generate("b", HOW)

    with pytest.raises(UsageError, match="in use"):
        model.generate("a", HOW, emit=emit)


@pytest.mark.parametrize("ends", [lambda stream: stream.close(), lambda stream: gc.collect()])
def test_a_stream_that_was_left_leaves_the_model_right(model: LanguageModel, ends: object) -> None:
    expected = [model.generate(prompt, HOW).text for prompt in PROMPTS]
    for count in (1, 4):
        stream = model.stream("hello there", HOW)
        list(islice(stream, count))
        ends(stream)  # type: ignore[operator]
        del stream
        assert [model.generate(prompt, HOW).text for prompt in PROMPTS] == expected


@pytest.mark.parametrize("place", ["forward", "rewind", "reset"])
def test_an_interrupted_answer_is_not_built_on(
    folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(folder)
    cache = PrefixCache(session)
    expected = list(generate(cache, [5, 6, 7, 8, 9], HOW))
    method = getattr(session, place)

    def interrupted(*arguments: object, **more: object) -> np.ndarray:
        method(*arguments, **more)
        raise KeyboardInterrupt

    prompt = [5, 6, 1] if place != "reset" else [1, 2]
    monkeypatch.setattr(session, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(generate(cache, prompt, HOW))
    monkeypatch.undo()
    assert list(generate(cache, [5, 6, 7, 8, 9], HOW)) == expected


def test_two_caches_of_one_session_do_not_believe_each_other(folder: Path) -> None:
    session = open_session(folder)
    cache = PrefixCache(session)
    expected = list(generate(cache, [5, 6, 7, 8], HOW))
    list(generate(session, [9, 9, 9, 9], HOW))
    assert list(generate(cache, [5, 6, 7, 8], HOW)) == expected
