"""Draft tokens out of the text: never a different answer, and fewer calls for what repeats."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from pipeline.runtime.drafting import _MOST_DRAFTED, PromptLookup, _best_draft_length
from pipeline.runtime.generate import generate
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import shared_export, tiny_llama

PROMPT = [5, 6, 7, 8, 5, 6, 7]


class Counting(TorchSession):
    """A session that counts its calls and may be asked for blocks."""

    row_cost: float | None = 0.1
    calls = 0

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        self.calls += 1
        return super().forward(input_ids, last_only)


class Reciting(Counting):
    """A model that says what it is told to, token by token, and is sure of it."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(tiny_llama())
        self.tokens = tokens

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        start = self.length
        logits = super().forward(input_ids, last_only)
        wanted = self.tokens[start + 1 : start + 1 + input_ids.shape[1]][-logits.shape[1] :]
        recited = np.zeros_like(logits)
        recited[0, np.arange(len(wanted)), wanted] = 9.0
        return recited


@pytest.mark.parametrize(
    "how",
    [
        GREEDY,
        Sampling(temperature=1.5, top_k=3),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.3, min_p=0.1, repetition_penalty=0.8),
    ],
)
@pytest.mark.parametrize("prompt", [[5], PROMPT, [9, 9, 9, 9, 9]])
def test_the_answer_is_the_one_without_draft_tokens(how: Sampling, prompt: list[int]) -> None:
    session = Counting(tiny_llama())
    plain = list(generate(session, prompt, Decoding(60, how)))
    lookup = PromptLookup(0.1)
    assert list(generate(session, prompt, Decoding(60, how), lookup)) == plain
    assert 0 <= lookup.taken <= lookup.drafted


def test_what_repeats_takes_fewer_calls() -> None:
    session = Reciting([1, 2, 3, 4, 5] * 20)
    lookup = PromptLookup(0.1)
    answer = list(generate(session, session.tokens[:10], Decoding(60), lookup))
    assert answer == session.tokens[10:70]
    assert session.calls <= 1 + 10
    assert lookup.taken == 60 - session.calls


def test_what_never_repeats_is_never_drafted() -> None:
    session = Reciting(list(range(1, 90)))
    lookup = PromptLookup(0.1)
    assert list(generate(session, [1, 2, 3], Decoding(40), lookup)) == session.tokens[3:43]
    assert session.calls == 40
    assert lookup.drafted == 0


def test_drafts_that_are_always_wrong_become_rare() -> None:
    # Every pair of tokens occurs again, followed by something new.
    tokens = [part for k in range(40) for part in (1, 2, 10 + k)]
    session, lookup = Reciting(tokens), PromptLookup(0.25)
    assert list(generate(session, tokens[:6], Decoding(110), lookup)) == tokens[6:116]
    assert lookup.taken < 10
    assert lookup.drafted < 60


@pytest.mark.parametrize("max_length", [12, 13, 17])
def test_it_ends_with_the_cache_and_with_the_limit_as_without(max_length: int) -> None:
    def ids(limit: int, lookup: PromptLookup | None) -> list[int]:
        session = Counting(tiny_llama(), max_length=max_length)
        return list(generate(session, PROMPT, Decoding(limit), lookup))

    for limit in (0, 1, 2, 5, 100):
        assert ids(limit, PromptLookup(0.01)) == ids(limit, None)


def test_it_ends_before_a_stop_id_among_the_draft_tokens() -> None:
    session = Reciting([1, 2, 3, 4, 5] * 20)
    decoding = Decoding(60, stop_ids={5})
    assert list(generate(session, session.tokens[:11], decoding, PromptLookup(0.1))) == [2, 3, 4]


def test_wrong_draft_tokens_leave_nothing_behind() -> None:
    session = Counting(tiny_llama())
    cache = PrefixCache(session)
    answer = list(generate(cache, PROMPT, Decoding(30), PromptLookup(0.01)))
    again = [*PROMPT, *answer, 11, 12]
    expected = list(generate(Counting(tiny_llama()), again, Decoding(10)))
    assert list(generate(cache, again, Decoding(10))) == expected


def test_a_consumer_may_leave_in_the_middle_of_a_draft() -> None:
    tokens = [1, 2, 3, 4, 5] * 20
    session = Reciting(tokens)
    cache = PrefixCache(session)
    answer = generate(cache, tokens[:11], Decoding(60), PromptLookup(0.1))
    taken = [next(answer) for _ in range(9)]
    assert isinstance(answer, Generator)
    answer.close()
    again = [*tokens[:11], *taken]
    assert list(generate(cache, again, Decoding(5))) == tokens[20:25]


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("row_cost", [0.05, 0.25, 0.9])
def test_the_length_is_the_best_of_all(acceptance: float, row_cost: float) -> None:
    def rate(count: int) -> float:
        return sum(acceptance**i for i in range(count + 1)) / (1 + count * row_cost)

    best = _best_draft_length(acceptance, row_cost, _MOST_DRAFTED)
    assert rate(best) == max(rate(count) for count in range(_MOST_DRAFTED + 1))
    assert (best > 0) == (acceptance > row_cost)


def test_the_longest_agreement_counts_and_of_those_the_latest() -> None:
    lookup = PromptLookup(0.01)
    lookup.learn([], [1, 2, 3, 50, 9, 2, 3, 60, 8, 2, 3, 70, 1, 2, 3])
    assert lookup.draft(1) == [50]
    lookup.learn([], [9, 4, 2, 3])
    assert lookup.draft(1) == [9]


def test_a_draft_is_no_longer_than_there_is_room() -> None:
    lookup = PromptLookup(0.01)
    lookup.learn([], [1, 2] * 10)
    assert lookup.draft(0) == lookup.draft(-1) == []
    assert lookup.draft(1) == [1]
    assert len(lookup.draft(1000)) <= _MOST_DRAFTED


def test_the_cpu_profile_drafts_unless_told_not_to() -> None:
    folder = shared_export("cpu")
    assert open_session(folder).row_cost is not None
    repeated = "abcabcabcabcabcabc" * 3
    with_drafts = LanguageModel.open(folder).generate(repeated, Decoding(60))
    without = LanguageModel.open(folder, drafter=None).generate(repeated, Decoding(60))
    assert without.drafted_tokens == without.taken_tokens == 0
    assert with_drafts.drafted_tokens > 0
    assert with_drafts.new_tokens == without.new_tokens


@pytest.mark.parametrize("profile", ["opset24", "compat"])
def test_other_sessions_do_not_draft(profile: str) -> None:
    folder: Path = shared_export(profile)
    assert LanguageModel.open(folder).generate("abcabcabcabc", Decoding(40)).drafted_tokens == 0


def test_a_row_that_is_computed_anyway_is_looked_up_even_if_it_is_seldom_right() -> None:
    assert _best_draft_length(0.01, 0.25, 12) == 0
    assert _best_draft_length(0.01, 0.25, 12, rows=2) == 1
    rates = [sum(0.9**k for k in range(d + 1)) / (1 + 0.1 * max(0, d - 1)) for d in range(13)]
    assert _best_draft_length(0.9, 0.1, 12, rows=2) == rates.index(max(rates))
    assert _best_draft_length(0.5, 0.25, 0, rows=2) == 0
