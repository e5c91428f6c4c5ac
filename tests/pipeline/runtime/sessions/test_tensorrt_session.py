from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.build import build_engine
from pipeline.engine.plan import EngineRequest
from pipeline.engine.target import resolve_target
from pipeline.errors import InputError
from pipeline.gpu import find_gpu
from pipeline.runtime.sessions.engine_calls import (
    load_engine_plugin,
    pick_profile,
    require_rows,
    split_call,
)
from pipeline.runtime.sessions.onnx_session import OnnxSession
from pipeline.runtime.sessions.slots import _SlotsOneByOne
from pipeline.runtime.sessions.tensorrt_session import TensorRTSession
from tests.support.fake_tensorrt import (
    MAX_LENGTH,
    PROFILES,
    VOCAB_SIZE,
    FakeEngine,
    FakeTorch,
    fake_engine,
)
from tests.support.tiny_graph import write_export


def shapes(rows: int, count: int, total: int) -> dict[str, tuple[int, ...]]:
    return {
        "input_ids": (rows, count),
        "attention_mask": (rows, total),
        "past_key_values.0.key": (rows, 3, 512, 64),
    }


def test_without_a_gpu_the_reason_is_given(tmp_path: Path) -> None:
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="no NVIDIA GPU: the engine was built ahead of time"):
        TensorRTSession(tmp_path)


@pytest.mark.parametrize(("count", "index"), [(1, 0), (2, 0), (3, 1), (256, 1)])
def test_one_token_takes_the_decode_profile_and_many_the_prefill(count: int, index: int) -> None:
    assert pick_profile(PROFILES, shapes(1, count, 300)) == index


@pytest.mark.parametrize(("rows", "count", "total"), [(3, 1, 1), (1, 257, 257), (1, 1, 513)])
def test_a_call_beyond_the_limits_has_no_profile(rows: int, count: int, total: int) -> None:
    with pytest.raises(InputError, match="No profile"):
        pick_profile(PROFILES, shapes(rows, count, total))


def test_long_prompts_are_run_in_pieces() -> None:
    assert split_call(5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert split_call(1, 256) == [(0, 1)]


def test_more_rows_than_the_engine_takes_are_refused() -> None:
    with pytest.raises(InputError, match="More rows"):
        require_rows(3, 2, "here")


def test_an_engine_with_a_plugin_refuses_another_library(tmp_path: Path) -> None:
    record = {"library": "libskip.so", "sha256": "0" * 64}
    manifest = {"block_skip": {"plugin": record}}
    with pytest.raises(InputError, match="missing"):
        load_engine_plugin(None, manifest, None, tmp_path)
    (tmp_path / "libskip.so").write_bytes(b"another build")
    with pytest.raises(InputError, match="plugin library"):
        load_engine_plugin(None, manifest, None, tmp_path)


def test_slots_of_one_engine_have_contexts_and_caches_of_their_own(tmp_path: Path) -> None:
    opened, engine = fake_engine()
    slots = _SlotsOneByOne(TensorRTSession(tmp_path, engine=opened), 3)
    prompt = np.ones(5, np.int64)
    for _ in range(2):  # prompts of some between tokens of the others
        slots.prefill(0, prompt)
        slots.decode([0], [1])
        slots.prefill(1, prompt)
        slots.decode([0, 1], [1, 1])
        slots.prefill(2, prompt)
        slots.decode([1, 0], [1, 1])
    assert len(engine.contexts) == 2 * slots.slots
    for context in engine.contexts:
        assert {run.profile for run in context.runs} <= {context.profile}
        assert {len(run.ids[0]) for run in context.runs} <= ({5} if context.profile else {1})
    caches = [{run.cache for run in context.runs} for context in engine.contexts]
    assert len(set.union(*caches)) == slots.slots
    assert [slots.slot_length(slot) for slot in range(3)] == [16, 14, 10]


def decoding(tmp_path: Path) -> tuple[TensorRTSession, FakeEngine, FakeTorch]:
    """A session behind a prompt of five tokens."""
    opened, engine = fake_engine()
    session = TensorRTSession(tmp_path, engine=opened)
    session.forward(np.arange(5)[None], last_only=True)
    return session, engine, opened.torch


def test_steps_are_replays_of_one_graph_with_a_padded_mask(tmp_path: Path) -> None:
    session, engine, _ = decoding(tmp_path)
    answers = [session.forward(np.array([[token]])) for token in (7, 8, 9, 10)]
    (graph,) = engine.graphs
    assert graph.replays == 3  # the first step prepares, the second is captured and replayed
    runs = engine.contexts[0].runs
    for place, (run, answer) in enumerate(zip(runs, answers, strict=True)):
        length = 5 + place
        assert run.ids == [[7 + place]]
        assert run.positions == [[length]]
        assert run.mask == [[1] * (length + 1) + [0] * (MAX_LENGTH - length - 1)]
        assert (answer == 1000 * length + 7 + place).all()
        assert answer.shape == (1, 1, VOCAB_SIZE)
    assert engine.contexts[1].runs[0].positions == [[0, 1, 2, 3, 4]]


def test_a_step_makes_no_tensor_and_tells_tensorrt_nothing(tmp_path: Path) -> None:
    session, engine, torch = decoding(tmp_path)
    made, told = torch.made, engine.contexts[0].told
    for token in range(6):
        session.forward(np.array([[token]]))
    session.reset()  # another answer goes on with the same memory, and the same graph
    session.forward(np.array([[3]]))
    assert (torch.made, engine.contexts[0].told) == (made, told)
    assert engine.contexts[0].runs[-1].mask == [[1] + [0] * (MAX_LENGTH - 1)]
    assert len(engine.graphs) == 1


def test_tokens_taken_back_are_masked_out_again(tmp_path: Path) -> None:
    session, engine, _ = decoding(tmp_path)
    for token in range(4):
        session.forward(np.array([[token]]))
    session.rewind(6)
    session.forward(np.array([[1]]))
    session.forward(np.arange(3)[None])
    session.forward(np.array([[2]]))
    sums = [sum(run.mask[0]) for run in engine.contexts[0].runs]
    assert sums == [6, 7, 8, 9, 7, 11]
    assert all(
        run.mask[0][: sum(run.mask[0])] == [1] * sum(run.mask[0]) for run in engine.contexts[0].runs
    )


def test_of_a_prompt_the_last_logits_alone_come_back(tmp_path: Path) -> None:
    session, _, _ = decoding(tmp_path)
    assert session.forward(np.arange(3)[None], last_only=True).shape == (1, 1, VOCAB_SIZE)
    assert session.forward(np.arange(3)[None]).shape == (1, 3, VOCAB_SIZE)


def test_where_no_graph_can_be_captured_it_says_so_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session, engine, torch = decoding(tmp_path)
    torch.capturable = False
    answers = [session.forward(np.array([[token]])) for token in range(4)]
    assert [int(answer[0, 0, 0]) for answer in answers] == [5000, 6001, 7002, 8003]
    said = capsys.readouterr().err
    assert said.count("without a CUDA graph, which is slower: operation not permitted") == 1
    assert engine.graphs == []


@pytest.mark.gpu
@pytest.mark.parametrize("profile", ["opset24", "compat"])
def test_an_engine_agrees_with_onnx_runtime_in_prefill_and_decode(
    tmp_path: Path, profile: str
) -> None:
    source = write_export(tmp_path / "onnx", profile=profile)
    build_engine(source, tmp_path / "engine", EngineRequest(resolve_target("auto")))
    engine, reference = TensorRTSession(tmp_path / "engine", source), OnnxSession(source)
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 12)):
        tokens = np.arange(start, stop, dtype=np.int64)[None]
        difference = np.abs(engine.forward(tokens) - reference.forward(tokens)).max()
        # float16 sums of 256 products of order 0.1, in another order.
        assert difference < 0.02
