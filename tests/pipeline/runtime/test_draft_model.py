"""A second model drafts over the same cache: no bit of an answer depends on what it drafts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError, UsageError
from pipeline.runtime.draft_model import DraftModel, open_drafted
from pipeline.runtime.draft_tree import TreeGrowth
from pipeline.runtime.drafting import Chooser
from pipeline.runtime.generate import generate, stream_batch
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions import onnx_cpu_session, onnx_graph
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from tests.support.scripted_drafts import DRAFTS, PROMPT, WARM, Scripted, said
from tests.support.tiny_decoder import (
    MAX_LENGTH,
    shared_draft,
    shared_export,
    shared_rounded_export,
    write_record,
)


def steady(folder: Path, slots: int = 1) -> CpuSession:
    return CpuSession(folder, threads=1, slots=slots, steady=True)


def drafted(length: int, draft: Path | None = None) -> tuple[CpuSession, DraftModel]:
    session, model = open_drafted(
        shared_export("cpu"), draft or shared_draft(), threads=1, length=length
    )
    assert model is not None
    return session, model


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that has the model's own numbers."""
    return shutil.copytree(shared_export("cpu"), tmp_path_factory.mktemp("twin") / "cpu")


# --- a row's bits do not depend on its block ---


def of_bytes() -> Path:
    return shared_export("cpu")


@pytest.mark.parametrize("folder", [of_bytes, shared_draft, shared_rounded_export])
def test_no_bit_depends_on_how_many_tokens_a_call_reads(folder: Callable[[], Path]) -> None:
    session = steady(folder(), slots=2)
    ids = np.random.default_rng(0).integers(0, 250, 60)

    def read(lengths: Sequence[int]) -> tuple[bytes, bytes]:
        session.clear(1)
        session.prefill(1, ids[:12])
        ends = np.cumsum([12, *lengths])
        rows = [session.read_block(1, ids[a:b]) for a, b in pairwise(ends)]
        assert ends[-1] == len(ids)
        held = [values[1, :, : len(ids)].tobytes() for values in session.values.buffers.values()]
        return np.concatenate(rows).tobytes(), b"".join(held)

    one_by_one = read([1] * 48)
    for lengths in ([48], [2] * 24, [1, 3, 7, 1, 16, 17, 3], [31, 17]):
        assert read(lengths) == one_by_one


def test_a_session_that_is_not_steady_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # A body's tiles are of 32 tokens for this model: of 33, the last is alone.
    monkeypatch.setattr(onnx_cpu_session, "STEADY_TOKENS", 33)
    monkeypatch.setattr(onnx_graph, "cpu_library", lambda: None)
    with pytest.raises(InputError, match="leave --draft out") as error:
        steady(shared_export("cpu"))
    assert "bits" in str(error.value)


def test_slots_decode_as_one_does_alone() -> None:
    session, alone = steady(shared_export("cpu"), slots=3), steady(shared_export("cpu"))
    for slot in (0, 2):
        session.prefill(slot, np.array([3 + slot, 4, 5]))
    logits = session.decode([2, 0], [9, 8])
    alone.prefill(0, np.array([5, 4, 5]))
    np.testing.assert_array_equal(logits[0], alone.decode([0], [9])[0])
    assert [session.slot_length(slot) for slot in range(3)] == [4, 0, 4]


def test_a_full_cache_is_one_token_shorter_and_said_to_be() -> None:
    session = steady(shared_export("cpu"))
    assert session.max_length == MAX_LENGTH - 1
    ids = np.zeros((1, MAX_LENGTH - 2), np.int64)
    session.forward(ids)
    last = session.forward(np.array([[1]]))
    session.rewind(MAX_LENGTH - 3)
    np.testing.assert_array_equal(session.forward(np.array([[0, 1]]))[0, 1], last[0, 0])
    with pytest.raises(InputError, match="Too many tokens"):
        session.forward(np.array([[1]]))


# --- whatever is drafted ---


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_ids_logits_and_cache_are_those_without_drafts(how: Sampling) -> None:
    session = steady(shared_export("cpu"))
    plain = said(session, how, None)
    for choose in DRAFTS.values():
        for length in (1, 2, 3, 7):
            drafter = Scripted(plain[0], length, choose)
            assert said(session, how, drafter) == plain
            assert drafter.drafted > 0


@pytest.mark.parametrize("how", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_model_drafts_and_changes_no_bit(how: Sampling, twin: Path) -> None:
    plain = said(steady(shared_export("cpu")), how, None)
    for draft in (shared_draft(), twin):
        for length in (0, 1, 2, 3, 7):
            session, model = drafted(length, draft)
            drafter = model.begin(0)
            assert said(session, how, drafter) == plain
            assert (drafter.drafted > 0) == (length > 0)


def test_a_draft_of_the_same_numbers_guesses_by_the_same_noise(twin: Path) -> None:
    for how in (GREEDY, WARM, Sampling(temperature=1.5)):
        session, model = drafted(3, twin)
        drafter = model.begin(0)
        ids = list(generate(session, PROMPT, Decoding(40, how, seed=1), drafter))
        assert len(ids) == 40
        # Its steps of one row round otherwise than the model's blocks, which turns a few.
        assert drafter.taken > 0.8 * drafter.drafted


def test_the_draft_reads_no_prompt_and_has_no_cache_of_its_own() -> None:
    session, model = drafted(3)
    assert isinstance(model._session, CpuSession)
    assert model._session.values is session.values
    list(generate(session, [7] * 60, Decoding(20), model.begin(0)))
    assert set(model._session.call_times.medians(999)) == {1}


def test_what_lies_in_the_places_of_drafts_and_behind_them_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = said(steady(shared_export("cpu")), GREEDY, None)
    session, model = drafted(3)
    grow = model.grow

    def poisoned(
        slot: int, read: int, token: int, most: int, begin: Callable[[], Chooser]
    ) -> TreeGrowth:
        found = grow(slot, read, token, most, begin)
        count = len(found.draft())
        for values in session.values.buffers.values():
            values[slot, :, read : read + 1 + count] = np.nan
            values[slot, :, read + 1 + count :] = 1e4
        return found

    monkeypatch.setattr(model, "grow", poisoned)
    assert said(session, GREEDY, model.begin(0)) == plain


def test_a_conversation_with_rewinds_goes_on_as_without_drafts() -> None:
    session, model = drafted(3)
    caches = [PrefixCache(session), PrefixCache(steady(shared_export("cpu")))]
    told = [1, 2, 3, 4]
    for turn in range(4):
        answers = [
            list(generate(cache, told, Decoding(12, WARM, seed=turn), drafter))
            for cache, drafter in zip(caches, (model.begin(0), None), strict=True)
        ]
        assert answers[0] == answers[1]
        told = [*told[: len(told) - turn], *answers[0], 30 + turn]


def test_answers_in_slots_are_those_alone() -> None:
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7], [8, 8], [40, 41, 42]]
    session, model = open_drafted(
        shared_export("cpu"), shared_draft(), threads=1, slots=2, length=3
    )
    seeds = [3] * len(prompts)
    together = stream_batch(session, prompts, Decoding(15, WARM), seeds=seeds, drafts=model)
    alone = steady(shared_export("cpu"))
    for running, prompt in zip(together, prompts, strict=True):
        alone.reset()
        assert running.ids == list(generate(alone, prompt, Decoding(15, WARM, seed=3)))


def test_more_slots_than_at_first_find_room_for_drafts() -> None:
    session, model = drafted(2)
    session.forward(np.array([PROMPT] * 3))
    expected = steady(shared_export("cpu"))
    expected.forward(np.array([PROMPT]))
    assert len(model.grow(2, len(PROMPT), 9, 2, Chooser).draft()) == 2
    rows = session.read_block(2, np.array([9, 4]))
    np.testing.assert_array_equal(rows, expected.read_block(0, np.array([9, 4])))


def test_a_language_model_asks_lookup_first_and_answers_alike() -> None:
    repeated = "abcabcabcabcabcabc" * 3
    plain = LanguageModel.open(shared_export("cpu"), drafter=None)
    plain._cache = PrefixCache(steady(shared_export("cpu")))
    expected = plain.generate(repeated, Decoding(60))
    session, model = open_drafted(
        shared_export("cpu"), shared_draft(), threads=1, lookup=True, length=2
    )
    found = LanguageModel(session, plain.tokenizer, drafter=model).generate(repeated, Decoding(60))
    assert found.text == expected.text
    assert found.drafted_tokens > 0


# --- what does not fit ---


def test_a_draft_whose_bytes_cannot_pay_is_not_opened_and_that_is_said(
    twin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session, model = open_drafted(shared_export("cpu"), twin)
    assert model is None
    assert session.max_length == MAX_LENGTH
    assert "cannot pay for itself" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "observed"),
    [
        ({"vocab_size": 999}, "vocab_size 999"),
        ({"num_layers": 1}, "num_layers 1"),
        ({"max_length": 80}, "max_length 80"),
        ({"cache_format": "int8"}, "cache_format int8"),
    ],
)
def test_a_draft_of_another_shape_is_refused_before_it_is_loaded(
    twin: Path, tmp_path: Path, changes: dict[str, object], observed: str
) -> None:
    other = shutil.copytree(twin, tmp_path / "other")
    write_record(other, "cpu", **changes)
    with pytest.raises(InputError, match="does not fit") as error:
        open_drafted(shared_export("cpu"), other)
    assert error.value.details["observed"] == observed


def test_another_rotation_is_refused(twin: Path, tmp_path: Path) -> None:
    other = shutil.copytree(twin, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 7}}))
    with pytest.raises(InputError, match="other angles"):
        open_drafted(shared_export("cpu"), other)


def test_another_tokenizer_is_refused(twin: Path, tmp_path: Path) -> None:
    other = shutil.copytree(twin, tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"aa"', 1))
    with pytest.raises(InputError, match="tokenizer is another"):
        open_drafted(shared_export("cpu"), other)


def test_a_cache_of_codes_and_the_model_itself_are_refused(twin: Path) -> None:
    with pytest.raises(InputError, match="few bits cannot be shared"):
        open_drafted(shared_rounded_export(), twin)
    with pytest.raises(UsageError, match="draft for itself"):
        open_drafted(twin, twin)


def test_other_kinds_of_folders_are_refused(twin: Path) -> None:
    for pair in ((shared_export("opset24"), twin), (twin, shared_export("compat"))):
        with pytest.raises(UsageError, match="profile 'cpu'") as error:
            open_drafted(*pair)
        assert "profile '" in error.value.details["observed"]
    with pytest.raises(UsageError, match="--backend onnx"):
        open_drafted(shared_export("cpu"), twin, backend="torch")
    with pytest.raises(UsageError, match="on the CPU"):
        LanguageModel.open(shared_export("cpu"), device="cuda", draft=twin)


def test_a_cache_of_another_layout_is_refused(twin: Path) -> None:
    other = steady(shared_rounded_export())
    with pytest.raises(InputError, match="cannot share a cache"):
        CpuSession(twin, values=other.values)


def test_a_target_that_checks_chains_alone_is_asked_for_no_tree() -> None:
    session, model = drafted(3)
    assert model._width == 1
    with pytest.raises(UsageError, match="one chain"):
        DraftModel(session, model._session, False, width=2)
    assert DraftModel(session, model._session, False, width=1)._width == 1
