from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError, UsageError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.runtime.generate import generate
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import SlotSession
from pipeline.runtime.sessions.slots import _SlotsOneByOne, open_slots
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import (
    MAX_LENGTH,
    VOCAB_SIZE,
    save_tiny_folder,
    tiny_llama,
)

# float32, sums in another order; logits are about 7.
TOLERANCE = 5e-5
BACKENDS = ("torch", "opset24", "compat", "cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, exports: dict[str, Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("slots")
    torch = save_tiny_folder(root / "tiny")
    as_float = ExportRequest("cpu", "float32", MAX_LENGTH, "float")
    export_folder(torch, root / "cpu", as_float)
    return {**exports, "torch": torch, "cpu": root / "cpu"}


@pytest.fixture(params=BACKENDS)
def slots(request: pytest.FixtureRequest, folders: dict[str, Path]) -> SlotSession:
    return open_slots(folders[request.param], slots=3)


@pytest.fixture
def alone() -> TorchSession:
    """The same model by itself."""
    return TorchSession(tiny_llama())


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 24))


def reference(alone: TorchSession, tokens: np.ndarray) -> np.ndarray:
    """Logits [S, V] of one sequence by torch, in one call."""
    alone.reset()
    return alone.forward(tokens[None])[0]


def test_interleaved_slots_answer_as_if_each_were_alone(
    slots: SlotSession, alone: TorchSession, tokens: np.ndarray
) -> None:
    expected = [reference(alone, row) for row in tokens]
    lengths = [5, 12, 9]
    for slot, length in enumerate(lengths):
        logits = slots.prefill(slot, tokens[slot, :length])
        np.testing.assert_allclose(logits, expected[slot][length - 1], atol=TOLERANCE)
    for step in range(6):
        order = [2, 0, 1] if step % 2 else [1, 2]
        given = [int(tokens[slot, lengths[slot]]) for slot in order]
        logits = slots.decode(order, given)
        assert logits.dtype == np.float32
        for row, slot in zip(logits, order, strict=True):
            np.testing.assert_allclose(row, expected[slot][lengths[slot]], atol=TOLERANCE)
            lengths[slot] += 1
    assert [slots.slot_length(slot) for slot in range(3)] == lengths


def test_a_rewound_slot_goes_on_from_what_is_left_and_the_others_do_not_notice(
    slots: SlotSession, alone: TorchSession, tokens: np.ndarray
) -> None:
    for slot in range(2):
        slots.prefill(slot, tokens[slot, :20])
    slots.rewind_slot(0, 8)
    assert slots.slot_length(0) == 8
    other = np.concatenate([tokens[0, :8], tokens[2, :6]])
    logits = slots.prefill(0, tokens[2, :6])
    np.testing.assert_allclose(logits, reference(alone, other)[-1], atol=TOLERANCE)
    logits = slots.decode([1], [int(tokens[1, 20])])
    np.testing.assert_allclose(logits[0], reference(alone, tokens[1])[20], atol=TOLERANCE)


def test_a_cleared_slot_begins_anew(
    slots: SlotSession, alone: TorchSession, tokens: np.ndarray
) -> None:
    slots.prefill(1, tokens[0])
    slots.clear(1)
    assert slots.slot_length(1) == 0
    logits = slots.prefill(1, tokens[1, :4])
    np.testing.assert_allclose(logits, reference(alone, tokens[1])[3], atol=TOLERANCE)


def test_a_slot_that_is_full_is_refused_alone(
    slots: SlotSession, alone: TorchSession, tokens: np.ndarray
) -> None:
    slots.prefill(0, np.ones(MAX_LENGTH, np.int64))
    slots.prefill(1, tokens[1, :4])
    with pytest.raises(InputError, match=f"at most {MAX_LENGTH}"):
        slots.decode([0], [1])
    logits = slots.decode([1], [int(tokens[1, 4])])
    np.testing.assert_allclose(logits[0], reference(alone, tokens[1])[4], atol=TOLERANCE)


def test_the_weights_are_held_once(exports: dict[str, Path]) -> None:
    onnx = _SlotsOneByOne(OnnxSession(exports["opset24"]), 4)
    assert len({id(session._session) for session in onnx._sessions}) == 1  # type: ignore[attr-defined]
    eager = _SlotsOneByOne(TorchSession(tiny_llama()), 4)
    assert len({id(session.model) for session in eager._sessions}) == 1  # type: ignore[attr-defined]


def test_greedy_by_slots_equals_generate(slots: SlotSession, alone: TorchSession) -> None:
    prompt = [5, 6, 7, 8]
    expected = list(generate(alone, prompt, Decoding(20)))
    answer = [int(slots.prefill(2, np.array(prompt)).argmax())]
    while len(answer) < 20:
        answer.append(int(slots.decode([2], answer[-1:])[0].argmax()))
    assert answer == expected


class Alone(TorchSession):
    """A backend that holds one sequence alone."""

    def sibling(self) -> TorchSession:
        raise UsageError("This backend holds one sequence alone.", where=self.name)


def test_a_backend_of_one_sequence_has_one_slot_and_refuses_more() -> None:
    assert _SlotsOneByOne(Alone(tiny_llama()), 1).slots == 1
    with pytest.raises(UsageError, match="one sequence"):
        _SlotsOneByOne(Alone(tiny_llama()), 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sibling_of_a_used_session_begins_empty_and_leaves_it_as_it_is(
    folders: dict[str, Path], backend: str, tokens: np.ndarray
) -> None:
    first = open_session(folders[backend])
    expected = first.forward(tokens[:1])[0]
    first.rewind(10)
    second = first.sibling()
    assert (first.length, second.length) == (10, 0)
    second.forward(tokens[1:2])
    np.testing.assert_allclose(first.forward(tokens[:1, 10:])[0], expected[10:], atol=TOLERANCE)
    second.reset()
    np.testing.assert_allclose(second.forward(tokens[:1])[0], expected, atol=TOLERANCE)
