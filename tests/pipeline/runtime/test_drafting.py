"""Guesses out of the text: never a different answer, and fewer calls for what repeats."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from pipeline.runtime.drafting import MOST_DRAFTED, Lookup, best_draft_length
from pipeline.runtime.generate import generate
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.prefix_cache import Transcript
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import BlockSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.tiny_decoder import shared_export, tiny_llama

PROMPT = [5, 6, 7, 8, 5, 6, 7]


class Counting(TorchSession):
    """A session that counts its calls and may be asked for blocks."""

    row_cost = 0.1
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
def test_the_answer_is_the_one_without_guesses(how: Sampling, prompt: list[int]) -> None:
    session = Counting(tiny_llama())
    plain = list(generate(session, prompt, 60, how))
    lookup = Lookup(0.1)
    assert list(generate(session, prompt, 60, how, lookup=lookup)) == plain
    assert 0 <= lookup.taken <= lookup.drafted


def test_what_repeats_takes_fewer_calls() -> None:
    session = Reciting([1, 2, 3, 4, 5] * 20)
    lookup = Lookup(0.1)
    answer = list(generate(session, session.tokens[:10], 60, lookup=lookup))
    assert answer == session.tokens[10:70]
    assert session.calls <= 1 + 10
    assert lookup.taken == 60 - session.calls


def test_what_never_repeats_is_never_guessed() -> None:
    session = Reciting(list(range(1, 90)))
    lookup = Lookup(0.1)
    assert list(generate(session, [1, 2, 3], 40, lookup=lookup)) == session.tokens[3:43]
    assert session.calls == 40
    assert lookup.drafted == 0


def test_guesses_that_are_always_wrong_become_rare() -> None:
    # Every pair of tokens occurs again, followed by something new.
    tokens = [part for k in range(40) for part in (1, 2, 10 + k)]
    session, lookup = Reciting(tokens), Lookup(0.25)
    assert list(generate(session, tokens[:6], 110, lookup=lookup)) == tokens[6:116]
    assert lookup.taken < 10
    assert lookup.drafted < 60


@pytest.mark.parametrize("max_length", [12, 13, 17])
def test_it_ends_with_the_cache_and_with_the_limit_as_without(max_length: int) -> None:
    def answer(limit: int, lookup: Lookup | None) -> list[int]:
        session = Counting(tiny_llama(), max_length=max_length)
        return list(generate(session, PROMPT, limit, lookup=lookup))

    for limit in (0, 1, 2, 5, 100):
        assert answer(limit, Lookup(0.01)) == answer(limit, None)


def test_it_ends_before_a_stop_id_among_the_guesses() -> None:
    session = Reciting([1, 2, 3, 4, 5] * 20)
    answer = list(generate(session, session.tokens[:11], 60, stop_ids={5}, lookup=Lookup(0.1)))
    assert answer == [2, 3, 4]


def test_wrong_guesses_leave_nothing_behind() -> None:
    session = Counting(tiny_llama())
    transcript = Transcript(session)
    answer = list(generate(transcript, PROMPT, 30, lookup=Lookup(0.01)))
    again = [*PROMPT, *answer, 11, 12]
    expected = list(generate(Counting(tiny_llama()), again, 10))
    assert list(generate(transcript, again, 10)) == expected


def test_a_consumer_may_leave_in_the_middle_of_a_draft() -> None:
    tokens = [1, 2, 3, 4, 5] * 20
    session = Reciting(tokens)
    transcript = Transcript(session)
    answer = generate(transcript, tokens[:11], 60, lookup=Lookup(0.1))
    taken = [next(answer) for _ in range(9)]
    assert isinstance(answer, Generator)
    answer.close()
    again = [*tokens[:11], *taken]
    assert list(generate(transcript, again, 5)) == tokens[20:25]


@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("row_cost", [0.05, 0.25, 0.9])
def test_the_length_is_the_best_of_all(acceptance: float, row_cost: float) -> None:
    def rate(count: int) -> float:
        return sum(acceptance**i for i in range(count + 1)) / (1 + count * row_cost)

    best = best_draft_length(acceptance, row_cost, MOST_DRAFTED)
    assert rate(best) == max(rate(count) for count in range(MOST_DRAFTED + 1))
    assert (best > 0) == (acceptance > row_cost)


def test_the_longest_agreement_counts_and_of_those_the_latest() -> None:
    lookup = Lookup(0.01)
    lookup.extend([1, 2, 3, 50, 9, 2, 3, 60, 8, 2, 3, 70, 1, 2, 3])
    assert lookup.draft(1) == [50]
    lookup.extend([9, 4, 2, 3])
    assert lookup.draft(1) == [9]


def test_a_draft_is_no_longer_than_there_is_room() -> None:
    lookup = Lookup(0.01)
    lookup.extend([1, 2] * 10)
    assert lookup.draft(0) == lookup.draft(-1) == []
    assert lookup.draft(1) == [1]
    assert len(lookup.draft(1000)) <= MOST_DRAFTED


def test_the_cpu_profile_guesses_unless_told_not_to() -> None:
    folder = shared_export("cpu")
    assert isinstance(open_session(folder), BlockSession)
    repeated = "abcabcabcabcabcabc" * 3
    with_guesses = LanguageModel.open(folder).generate(repeated, 60)
    without = LanguageModel.open(folder, lookup=False).generate(repeated, 60)
    assert without.drafted_tokens == without.taken_tokens == 0
    assert with_guesses.drafted_tokens > 0
    assert with_guesses.new_tokens == without.new_tokens


@pytest.mark.parametrize("profile", ["opset24", "compat"])
def test_other_sessions_do_not_guess(profile: str) -> None:
    folder: Path = shared_export(profile)
    assert LanguageModel.open(folder).generate("abcabcabcabc", 40).drafted_tokens == 0
