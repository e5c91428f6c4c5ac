from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.runtime.device.engine import open_engine
from pipeline.runtime.device.session import DeviceSession
from pipeline.runtime.generate import generate
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.fake_gpu.board import Board, board_engine, half_engine
from tests.support.tiny_decoder import shared_export

FORMS = ("opset24", "compat-static", "compat")


def prompt(length: int, seed: int = 0) -> list[int]:
    return [65 + (7 * seed + 3 * place) % 26 for place in range(length)]


def open_session(profile: str, board: Board) -> DeviceSession:
    return DeviceSession(open_engine(board_engine(profile, board), board.driver()))


def tokens(session: object, ids: list[int], count: int = 12) -> list[int]:
    return list(generate(session, ids, Decoding(max_new_tokens=count)))  # type: ignore[arg-type]


def block(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int64)


@pytest.mark.parametrize("profile", FORMS)
@pytest.mark.parametrize(
    ("prompts", "count"),
    [((1, 5, 31), 12), pytest.param((3, 7, 11, 15, 19, 23, 27, 31), 64, marks=pytest.mark.slow)],
)
def test_greedy_tokens_are_those_of_onnx_runtime(
    profile: str, prompts: tuple[int, ...], count: int, board: Board
) -> None:
    session, reference = open_session(profile, board), OnnxSession(shared_export(profile))
    for seed, length in enumerate(prompts):  # of which 8 are read in a call
        ids = prompt(length, seed)
        assert tokens(session, ids, count) == tokens(reference, ids, count)
    assert session.is_captured == (profile != "compat")


@pytest.mark.parametrize("profile", FORMS)
def test_two_rows_answer_as_each_alone(profile: str, board: Board) -> None:
    session, reference = open_session(profile, board), OnnxSession(shared_export(profile))
    pair = block(prompt(11), prompt(11, 1))
    for stop in (9, 10, 11):
        start = session.length
        found = session.forward(pair[:, start:stop])
        np.testing.assert_allclose(found, reference.forward(pair[:, start:stop]), atol=1e-4)
    session.reset()  # one row behind two: everything is made anew
    reference.reset()
    assert tokens(session, prompt(5)) == tokens(reference, prompt(5))


@pytest.mark.parametrize("profile", FORMS)
def test_a_conversation_goes_on_from_what_it_shares_with_the_last(
    profile: str, board: Board
) -> None:
    session, reference = open_session(profile, board), OnnxSession(shared_export(profile))
    cache, other = PrefixCache(session), PrefixCache(session.sibling())
    first, second = prompt(12), [*prompt(9), *prompt(6, 2)]
    for ids in (first, second, first):
        assert tokens(cache, ids) == tokens(reference, ids)
        # A second conversation takes turns with the first, over the same engine.
        assert tokens(other, ids[::-1]) == tokens(reference, ids[::-1])


@pytest.mark.parametrize("profile", FORMS)
def test_logits_of_half_precision_are_read_as_such(
    profile: str, board: Board, tmp_path: Path
) -> None:
    source, folder = half_engine(tmp_path, profile)
    session = DeviceSession(open_engine(folder, board.driver()))
    reference = OnnxSession(source)
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 12)):
        ids = np.arange(start, stop, dtype=np.int64)[None]
        found = session.forward(ids)
        assert found.dtype == np.float32
        # One rounding of float16 where sums are taken in another order.
        np.testing.assert_allclose(found, reference.forward(ids), atol=0.01)


def test_a_captured_token_takes_three_calls_and_no_memory(board: Board) -> None:
    session = open_session("opset24", board)
    session.forward(block(prompt(9)))
    for token in (65, 66):  # prepared, then captured
        session.forward(block([token]))
    assert session.is_captured
    calls, allocations = board.calls, board.allocations
    for token in range(67, 77):
        session.forward(block([token]))
    assert board.calls - calls == 3 * 10  # the thread's context, launch, wait
    assert board.allocations == allocations
