"""Rows of different lengths over one cache give what each gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sessions import onnx_cpu_session as cpu_session
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import RepeatingSession, SlotSession
from tests.support.tiny_decoder import MAX_LENGTH, VOCAB_SIZE, save_tiny_folder, shared_export

IDS = np.random.default_rng(0).integers(0, 250, size=(3, 40))


@pytest.fixture(scope="module")
def folder() -> Path:
    return shared_export("cpu")


@pytest.fixture
def session(folder: Path) -> CpuSession:
    return CpuSession(folder, threads=1, slots=4)


def alone(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [S, V] of one sequence in a session of its own."""
    return CpuSession(folder, threads=1).forward(ids[None])[0]


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_it_is_what_open_session_opens_and_all_kinds_of_session(folder: Path) -> None:
    session = open_session(folder)
    assert isinstance(session, CpuSession)
    assert isinstance(session, RepeatingSession)
    assert isinstance(session, SlotSession)


def test_a_prompt_read_by_parts_gives_the_same_logits(
    folder: Path, session: CpuSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session.forward(IDS)
    monkeypatch.setattr(cpu_session, "_PREFILL_TOKENS", 7)
    session.reset()
    close(session.forward(IDS), whole)
    session.reset()
    close(session.forward(IDS, last_only=True), whole[:, -1:])


def test_slots_of_different_lengths_decode_together_as_they_would_alone(
    folder: Path, session: CpuSession
) -> None:
    prompts = {0: IDS[0, :10], 3: IDS[1, :25], 2: IDS[2, :4]}
    for slot, prompt in prompts.items():
        close(session.prefill(slot, prompt), alone(folder, prompt)[-1])
    for step in range(5):
        sources = {0: IDS[0, 10:], 3: IDS[1, 25:], 2: IDS[2, 4:]}
        rows = session.decode([3, 0, 2], [sources[slot][step] for slot in (3, 0, 2)])
        for slot, row in zip((3, 0, 2), rows, strict=True):
            ids = np.concatenate([prompts[slot], sources[slot][: step + 1]])
            close(row, alone(folder, ids)[-1])
    assert [session.slot_length(slot) for slot in range(4)] == [15, 0, 9, 30]


def test_a_slot_between_two_others_is_not_changed_by_their_decoding(
    folder: Path, session: CpuSession
) -> None:
    for slot, count in ((0, 5), (1, 8), (2, 6)):
        session.prefill(slot, IDS[slot, :count])
    session.decode([0, 2], [1, 2])
    session.decode([0, 2], [3, 4])
    close(session.decode([1], [IDS[1, 8]])[0], alone(folder, IDS[1, :9])[-1])


@pytest.fixture(scope="module", params=["int4", "int4-offset", "int8"])
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rounded")
    wanted = ExportRequest("cpu", weights=request.param, max_length=48)
    export_folder(save_tiny_folder(root / "model"), root / "cpu", wanted)
    return root / "cpu"


def test_with_rounded_weights_other_requests_change_no_bit_of_an_answer(rounded: Path) -> None:
    together, apart = (CpuSession(rounded, threads=2, slots=3) for _ in range(2))
    for session in (together, apart):
        for slot in range(3):
            session.prefill(slot, IDS[slot, : 5 + slot])
    for step in range(8, 12):
        tokens = [int(IDS[slot, step]) for slot in range(3)]
        expected = together.decode(range(3), tokens)
        for slot in (1, 0, 2):
            logits = apart.decode([slot], [tokens[slot]])[0]
            np.testing.assert_array_equal(logits, expected[slot])
    assert [apart.slot_length(slot) for slot in range(3)] == [9, 10, 11]


@pytest.mark.parametrize("count", [2, 8, 9, 16, 17, 39, 40])
def test_with_rounded_weights_no_bit_depends_on_where_a_prompt_was_cut(
    rounded: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = CpuSession(rounded, threads=2)
    whole = session.forward(IDS[:1, :count])
    monkeypatch.setattr(cpu_session, "_PREFILL_TOKENS", 8)
    session.reset()
    np.testing.assert_array_equal(session.forward(IDS[:1, :count]), whole)
    session.reset()
    np.testing.assert_array_equal(session.forward(IDS[:1, :count], last_only=True), whole[:, -1:])


def test_with_rounded_weights_the_same_prompt_gives_the_same_bits_again(rounded: Path) -> None:
    cache = PrefixCache(CpuSession(rounded, threads=2))
    prompt = IDS[0, :20].tolist()
    first = cache.read(cache.begin(prompt)).copy()
    for ids in ([3], [3, 4], [5, 6, 7]):
        cache.read(ids)
        np.testing.assert_array_equal(cache.read(cache.begin(prompt)), first)


def test_a_cleared_and_a_rewound_slot_start_where_they_should(
    folder: Path, session: CpuSession
) -> None:
    session.prefill(1, IDS[0])
    session.rewind_slot(1, 12)
    close(session.prefill(1, IDS[1, :3]), alone(folder, np.r_[IDS[0, :12], IDS[1, :3]])[-1])
    session.clear(1)
    close(session.prefill(1, IDS[2]), alone(folder, IDS[2])[-1])


def test_rewinding_takes_tokens_back(folder: Path, session: CpuSession) -> None:
    session.forward(IDS[:1])
    session.rewind(20)
    assert session.length == 20
    close(session.forward(IDS[1:2, 20:])[0], alone(folder, np.r_[IDS[0, :20], IDS[1, 20:]])[20:])


def test_a_repeated_sequence_goes_on_in_several_ways(folder: Path, session: CpuSession) -> None:
    session.forward(IDS[:1, :9])
    session.repeat(6)
    logits = session.forward(np.arange(6)[:, None])
    for row in range(6):
        close(logits[row, 0], alone(folder, np.r_[IDS[0, :9], row])[-1])


def test_more_rows_than_slots_find_room(session: CpuSession) -> None:
    assert session.forward(np.repeat(IDS[:1], 9, axis=0)).shape == (9, 40, VOCAB_SIZE)


def test_a_full_slot_is_refused_and_the_others_keep_their_tokens(session: CpuSession) -> None:
    session.prefill(0, np.zeros(MAX_LENGTH, np.int64))
    session.prefill(1, IDS[0, :5])
    with pytest.raises(InputError, match="Too many tokens"):
        session.decode([0, 1], [1, 1])
    assert [session.slot_length(0), session.slot_length(1)] == [MAX_LENGTH, 5]


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_ids_outside_the_vocabulary_are_refused(session: CpuSession, token: int) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        session.decode([0], [token])
