"""Greedy answers: together as alone, and no more together than a session takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import tiny_model
from tests.support.tiny_decoder import VOCAB_SIZE, shared_export, tiny_llama
from validate import greedy
from validate.greedy import trace_greedy

TOKENS = 12
# More than go together, so that the last ones are fewer.
PROMPTS = np.random.default_rng(0).integers(0, VOCAB_SIZE, size=(6, 7))


class _OneRow(TorchSession):
    """A session that takes one sequence at a time."""

    max_rows: int | None = 1

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        assert len(input_ids) == 1
        return super().forward(input_ids, last_only)


def opened(kind: str) -> Session:
    if kind == "torch":
        return TorchSession(tiny_llama())
    return _OneRow(tiny_llama()) if kind == "one row" else open_session(shared_export(kind))


@pytest.mark.parametrize("kind", ["torch", "one row", "opset24", "cpu"])
def test_prompts_are_answered_together_as_alone(kind: str) -> None:
    session = opened(kind)
    together = trace_greedy(session, PROMPTS, TOKENS, {})
    alone = [trace_greedy(session, prompt[None], TOKENS, {})[0] for prompt in PROMPTS]
    assert [trace.tokens for trace in together] == [trace.tokens for trace in alone]
    assert len({tuple(trace.tokens) for trace in alone}) > 1
    for mine, theirs in zip(together, alone, strict=True):
        # Logits are near 10; sums of float32 in another order differ by some units of 1e-6.
        np.testing.assert_allclose(mine.margins, theirs.margins, rtol=0, atol=1e-4)
        np.testing.assert_allclose(mine.scales, theirs.scales, rtol=0, atol=1e-4)


def test_each_answer_is_held_against_its_own_of_the_other_stage() -> None:
    session = TorchSession(tiny_llama())
    first = trace_greedy(session, PROMPTS, TOKENS, {})
    again = trace_greedy(session, PROMPTS, TOKENS, {"first": first})
    assert [trace.gaps for trace in again] == [{"first": None}] * len(PROMPTS)
    changed = [list(trace.tokens) for trace in first]
    changed[4][3] = (changed[4][3] + 1) % VOCAB_SIZE
    others = [type(trace)(tokens, [], {}) for trace, tokens in zip(first, changed, strict=True)]
    found = trace_greedy(session, PROMPTS, TOKENS, {"other": others})
    gaps = [trace.gaps["other"] for trace in found]
    assert [number for number, gap in enumerate(gaps) if gap is not None] == [4]
    assert gaps[4] is not None
    assert gaps[4] > 0


@pytest.mark.parametrize("kind", ["torch", "one row", "opset24", "compat", "cpu"])
def test_answers_of_another_stage_are_draft_tokens_that_change_no_answer(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, calls = opened(kind), list[tuple[int, ...]]()
    forward = session.forward

    def counted(input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        calls.append(input_ids.shape)
        return forward(input_ids, last_only)

    monkeypatch.setattr(session, "forward", counted)
    monkeypatch.setattr(greedy, "_DRAFT_TOKENS", 7)
    alone = trace_greedy(session, PROMPTS[:2], TOKENS, {})
    steps = len(calls)
    others = [replace(trace, tokens=list(trace.tokens)) for trace in alone]
    read = trace_greedy(session, PROMPTS[:2], TOKENS, {"other": others})
    assert [trace.tokens for trace in read] == [trace.tokens for trace in alone]
    # The prompt and 11 further tokens: a block of 8 and one of 3, for 11 single steps.
    rows = 1 if kind == "one row" else 2
    assert calls[steps:] == [(rows, 7), (rows, 8), (rows, 3)] * (2 // rows)

    others[1].tokens[5] = (others[1].tokens[5] + 1) % VOCAB_SIZE
    left = trace_greedy(session, PROMPTS[:2], TOKENS, {"other": others})
    assert [trace.tokens for trace in left] == [trace.tokens for trace in alone]
    assert left[0].gaps == {"other": None}
    gap = left[1].gaps["other"]
    assert gap is not None
    assert gap > 0


def test_a_cache_that_cannot_forget_a_draft_is_read_again() -> None:
    model = tiny_model("mistral", sliding_window=4)
    session = TorchSession(model)
    prompts = PROMPTS[:2] % model.config.vocab_size
    alone = trace_greedy(session, prompts, TOKENS, {})
    others = [replace(trace, tokens=[*trace.tokens[:4], 0, *trace.tokens[5:]]) for trace in alone]
    left = trace_greedy(session, prompts, TOKENS, {"other": others})
    assert [trace.tokens for trace in left] == [trace.tokens for trace in alone]
