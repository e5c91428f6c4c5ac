"""The Python API: the same text by every way, and nothing read twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.runtime.generate import _generate_batch, generate
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.slots import open_slots
from tests.support.tiny_decoder import save_tiny_folder, shared_export

SAMPLING = Sampling(temperature=1.0, top_k=20)
PROMPTS = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7], [8, 8], [40, 41, 42]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    exports = {profile: shared_export(profile) for profile in ("opset24", "compat", "cpu")}
    return exports | {"torch": save_tiny_folder(tmp_path_factory.mktemp("torch"))}


@pytest.fixture(params=["opset24", "compat", "cpu", "torch"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def test_streaming_gives_the_pieces_of_the_same_text(folder: Path) -> None:
    model = LanguageModel.open(folder)
    decoding = Decoding(20, SAMPLING, seed=3)
    whole = model.generate("hello", decoding)
    assert "".join(model.stream("hello", decoding)) == whole.text
    assert whole.new_tokens <= 20


def test_a_stop_string_ends_text_and_stream(folder: Path) -> None:
    model = LanguageModel.open(folder)
    free = model.generate("hello", Decoding(40, SAMPLING)).text
    stop = free[len(free) // 2 :][:2]
    decoding = Decoding(40, SAMPLING, stops=[stop])
    stopped = model.generate("hello", decoding)
    assert stopped.text == free[: free.index(stop)]
    assert stopped.ended == "stop"
    assert "".join(model.stream("hello", decoding)) == stopped.text


def test_a_conversation_answers_as_if_each_turn_were_read_from_the_start(folder: Path) -> None:
    model = LanguageModel.open(folder)
    messages = [{"role": "user", "content": "hello"}]
    for _ in range(3):
        answer = model.chat(messages, Decoding(6)).text
        assert answer == LanguageModel.open(folder).chat(messages, Decoding(6)).text
        messages += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "and then?"},
        ]


def test_a_second_prompt_reads_only_what_is_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(folder)
    cache = PrefixCache(session)
    list(generate(cache, [5, 6, 7, 8], Decoding(3)))
    read: list[int] = []
    forward = session.forward

    def counting(input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        read.append(input_ids.shape[1])
        return forward(input_ids, last_only)

    monkeypatch.setattr(session, "forward", counting)
    list(generate(cache, [5, 6, 7, 8, 9, 10], Decoding(1)))
    assert read[0] <= 2


def test_after_a_failure_nothing_is_built_on(folder: Path) -> None:
    cache = PrefixCache(open_session(folder))
    expected = list(generate(cache, [5, 6, 7, 8], Decoding(5)))
    with pytest.raises(InputError):
        list(generate(cache, [5, 6, 7, 8, 10**6], Decoding(5)))
    assert list(generate(cache, [5, 6, 7, 8], Decoding(5))) == expected


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_batch_answers_each_prompt_as_alone(folder: Path, slots: int, sampling: Sampling) -> None:
    decoding = Decoding(9, sampling, stop_ids={250})
    answers = _generate_batch(open_slots(folder, slots=slots), PROMPTS, decoding)
    for number, prompt in enumerate(PROMPTS):
        own = replace(decoding, seed=[0, number])
        assert answers[number].ids == list(generate(open_session(folder), prompt, own))


def test_a_batch_refuses_an_empty_prompt(folder: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        _generate_batch(open_slots(folder, slots=2), [[1], []], Decoding(3))


def test_an_engine_says_that_it_needs_a_gpu(folders: dict[str, Path], tmp_path: Path) -> None:
    from pipeline.gpu import find_gpu

    if find_gpu() is not None:
        pytest.skip("a GPU is here, so the engine's own tests cover it")
    (tmp_path / "engine.plan").write_bytes(b"plan")
    with pytest.raises(InputError, match="GPU"):
        open_session(tmp_path)


@pytest.mark.parametrize("prompt", [b"abc", [1.7, 2.2], 5, None, {"a": 1}, ["a"], np.ones(3), ""])
def test_what_is_neither_text_nor_ids_is_refused(folders: dict[str, Path], prompt: object) -> None:
    model = LanguageModel.open(folders["cpu"])
    with pytest.raises(InputError):
        model.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        list(model.stream(prompt))  # type: ignore[arg-type]


@pytest.mark.parametrize("messages", ["hi", [], [{"role": "user", "content": None}]])
def test_what_is_no_conversation_is_refused(folders: dict[str, Path], messages: object) -> None:
    model = LanguageModel.open(folders["cpu"])
    for raw in (True, False):
        with pytest.raises(InputError):
            model.chat(messages, raw=raw)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"stops": "END"}, {"stops": [b"END"]}, {"stop_ids": "12"}, {"max_new_tokens": 2.5}],
)
def test_settings_that_mean_something_else_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Decoding(**settings)  # type: ignore[arg-type]


def test_ids_may_be_of_numpy(folders: dict[str, Path]) -> None:
    model = LanguageModel.open(folders["cpu"])
    ids = [5, 6, 7]
    assert model.generate(np.array(ids), Decoding(4)).text == model.generate(ids, Decoding(4)).text  # type: ignore[arg-type]
