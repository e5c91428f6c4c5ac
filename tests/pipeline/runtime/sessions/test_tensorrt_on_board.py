"""`TensorRTSession` executed: the fake TensorRT computes on the addresses that it binds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.runtime.device import engine as engine_module
from pipeline.runtime.device.session import DeviceSession
from pipeline.runtime.generate import generate
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.tensorrt_session import TensorRTSession
from tests.support.fake_gpu.board import Board, board, board_engine, half_engine
from tests.support.fake_gpu.torch_on_board import open_with_torch
from tests.support.tiny_decoder import shared_export

__all__ = ["board"]
FORMS = ("opset24", "compat-static", "compat")
FIRST, SECOND = list(range(65, 77)), [*range(65, 74), 90, 91, 92, 93]


def on_board(folder: Path, board: Board) -> TensorRTSession:
    return TensorRTSession(folder, name="fake", engine=open_with_torch(folder, board))


@pytest.mark.parametrize("profile", FORMS)
def test_a_conversation_has_the_tokens_of_onnx_runtime(profile: str, board: Board) -> None:
    session = on_board(board_engine(profile, board), board)
    reference = OnnxSession(shared_export(profile))
    cache, decoding = PrefixCache(session), Decoding(max_new_tokens=8)
    for ids in (FIRST, SECOND, FIRST):  # of which each goes on from the last
        assert list(generate(cache, ids, decoding)) == list(generate(reference, ids, decoding))


@pytest.mark.parametrize("profile", FORMS)
def test_rows_and_half_precision_agree_with_onnx_runtime(
    profile: str, board: Board, tmp_path: Path
) -> None:
    source, folder = half_engine(tmp_path, profile)
    session, reference = on_board(folder, board), OnnxSession(source)
    pair = np.array([range(12), range(12, 24)], np.int64)
    for start, stop in ((0, 9), (9, 10), (10, 12)):
        found = session.forward(pair[:, start:stop])
        np.testing.assert_allclose(found, reference.forward(pair[:, start:stop]), atol=0.01)


def test_a_mask_over_a_fixed_cache_has_one_shape(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = on_board(board_engine("opset24", board), board)
    bind, shapes = TensorRTSession._bind, []

    def noting(self: TensorRTSession, index: int, given: Any, addresses: Any) -> None:
        shapes.append(given["attention_mask"])
        bind(self, index, given, addresses)

    monkeypatch.setattr(TensorRTSession, "_bind", noting)
    for start, stop in ((0, 5), (5, 6), (6, 7)):
        session.forward(np.array([FIRST[start:stop]], np.int64))
    assert shapes == [(1, session.max_length)] * 2  # of the step once, and of the prompt


def test_an_engine_is_opened_without_torch_where_torch_has_no_cuda(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "Driver", board.driver)
    session = open_session(board_engine("opset24", board))
    assert isinstance(session, DeviceSession)
    reference, decoding = OnnxSession(shared_export("opset24")), Decoding(max_new_tokens=4)
    assert list(generate(session, FIRST, decoding)) == list(generate(reference, FIRST, decoding))
