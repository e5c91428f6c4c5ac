"""The session over a static cache says what the one over a growing cache says, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pipeline.errors import InputError
from pipeline.runtime.sessions.slots import _SlotsOneByOne
from pipeline.runtime.sessions.static_session import StaticSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import tiny_model
from tests.support.tiny_decoder import MAX_LENGTH, VOCAB_SIZE, tiny_llama

TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, 14))
PIECES = ((0, 7), (7, 8), (8, 9), (9, 12), (12, 13), (13, 14))


def session(max_length: int = 64) -> StaticSession:
    return StaticSession(tiny_llama(), "torch static", max_length)


def test_it_equals_the_growing_cache_piece_by_piece() -> None:
    expected = TorchSession(tiny_llama()).forward(TOKENS)
    under_test = session()
    for _ in range(2):
        pieces = [under_test.forward(TOKENS[:, a:b]) for a, b in PIECES]
        np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=5e-5)
        under_test.reset()


def test_what_was_taken_back_is_forgotten() -> None:
    under_test = session()
    expected = under_test.forward(TOKENS)
    under_test.rewind(20)
    assert under_test.length == 14
    under_test.rewind(5)
    under_test.forward(np.full((1, 3), 9))
    under_test.rewind(5)
    np.testing.assert_allclose(under_test.forward(TOKENS[:, 5:]), expected[:, 5:], atol=5e-5)


def test_the_cache_keeps_its_memory() -> None:
    under_test = session()
    under_test.forward(TOKENS)
    before = [layer.keys.data_ptr() for layer in under_test._cache.layers]
    under_test.reset()
    under_test.forward(TOKENS[:, :1])
    assert [layer.keys.data_ptr() for layer in under_test._cache.layers] == before


def test_counters_made_in_a_step_as_on_a_gpu_can_be_set_back() -> None:
    under_test = session()
    expected = under_test.forward(TOKENS)
    with torch.inference_mode():  # where the cache moves them to the GPU
        for layer in under_test._cache.layers:
            layer.cumulative_length = layer.cumulative_length.clone()
    under_test.reset()
    np.testing.assert_allclose(under_test.forward(TOKENS), expected, atol=5e-5)


def test_logits_on_the_device_are_those_of_forward() -> None:
    for under_test in (session(), TorchSession(tiny_llama())):
        expected = [under_test.forward(TOKENS[:, a:b]) for a, b in PIECES]
        under_test.reset()
        for (a, b), logits in zip(PIECES, expected, strict=True):
            found = under_test.logits(torch.from_numpy(TOKENS[:, a:b]))
            np.testing.assert_array_equal(found.numpy(), logits)
        assert under_test.length == TOKENS.shape[1]


def test_slots_have_caches_of_their_own_over_the_same_weights() -> None:
    first = session()
    slots = _SlotsOneByOne(first, 3)
    second = first.sibling()
    assert second.model is first.model
    other = (TOKENS + 1) % VOCAB_SIZE
    expected = [TorchSession(tiny_llama()).forward(ids)[0] for ids in (TOKENS, other)]
    for slot, ids in enumerate((TOKENS, other)):
        slots.prefill(slot, ids[0, :7])
    for step in range(7, 14):
        tokens = [int(ids[0, step]) for ids in (other, TOKENS)]
        logits = slots.decode([1, 0], tokens)
        np.testing.assert_allclose(logits[0], expected[1][step], atol=5e-5)
        np.testing.assert_allclose(logits[1], expected[0][step], atol=5e-5)


def test_a_graph_captured_by_one_session_is_not_replayed_by_its_sibling() -> None:
    first = session()
    first.forward(TOKENS)
    first._launch = lambda: pytest.fail("replayed by another session")
    second = first.sibling()
    assert second.length == 0
    second.forward(TOKENS[:, :1])
    own, others = ([layer.keys for layer in s._cache.layers] for s in (first, second))
    assert not {keys.data_ptr() for keys in own} & {keys.data_ptr() for keys in others}


class Noted(TorchDispatchMode):
    """Notes which operations run, and on which memory their results lie."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        result: torch.Tensor = func(*args, **(kwargs or {}))
        self.calls.append((str(func), result.untyped_storage().data_ptr()))
        return result


def test_a_step_makes_no_tensor_beside_those_of_its_graph() -> None:
    under_test = session()
    expected = under_test.forward(TOKENS)[:, 7:]
    under_test.rewind(7)
    step = under_test._launch
    assert step is not None

    def replayed() -> None:  # on a GPU a graph: nothing of it is seen from here
        with _disable_current_modes():
            step()

    under_test._launch = replayed
    noted = Noted()
    pieces = []
    for place in range(7, TOKENS.shape[1]):
        with noted:
            pieces.append(under_test.forward(TOKENS[:, place : place + 1]))
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=5e-5)
    own = {held.untyped_storage().data_ptr() for held in (under_test._token, under_test._told)}
    assert {name for name, _ in noted.calls} <= {"aten.copy_.default", "aten.detach.default"}
    copies = [where for name, where in noted.calls if name == "aten.copy_.default"]
    assert len(copies) == 2 * len(pieces)
    assert {*copies} == own


def test_logits_of_a_step_stay_as_they_are_when_the_next_one_runs() -> None:
    under_test = session()
    first = under_test.forward(TOKENS[:, :1])
    before = first.copy()
    under_test.forward(TOKENS[:, 1:2])
    np.testing.assert_array_equal(first, before)


def test_limits_are_kept() -> None:
    assert session(10 * MAX_LENGTH).max_length == MAX_LENGTH
    with pytest.raises(InputError, match="at most 8"):
        session(8).forward(TOKENS)
    with pytest.raises(InputError, match="batch size"):
        session().forward(np.ones((2, 3), dtype=np.int64))


def test_a_sliding_window_is_refused() -> None:
    with pytest.raises(InputError, match="full attention"):
        StaticSession(tiny_model("gemma3_text"), "torch static", 64)


@pytest.mark.gpu
def test_the_captured_step_equals_the_eager_one() -> None:
    expected = TorchSession(tiny_llama()).forward(TOKENS)
    under_test = StaticSession(tiny_llama().to("cuda"), "torch cuda", 64)
    pieces = [under_test.forward(TOKENS[:, a:b]) for a, b in PIECES]
    assert under_test._launch is not None
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=1e-2)
