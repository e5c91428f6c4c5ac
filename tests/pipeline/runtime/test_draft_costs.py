"""How many tokens a model drafts: by times that are given here, and by what was right."""

from __future__ import annotations

import pytest

from pipeline.runtime.draft_costs import MOST_DRAFTED, DraftCosts, GuessOdds
from pipeline.runtime.sessions.call_times import CallTimes


def costs(call_s: float, row_s: float, step_s: float) -> DraftCosts:
    """With calls of 2 and of 9 rows timed, and a step of the draft."""
    calls, steps = CallTimes(), CallTimes()
    calls.add(2, call_s)
    calls.add(9, call_s + 7 * row_s)
    calls.add(100, 99.0)  # of a prompt
    steps.add(1, step_s)
    return DraftCosts(calls, steps, 0.25)


def learn(found: DraftCosts, right: int, drafted: int, times: int = 20) -> DraftCosts:
    for _ in range(times):
        found.learn(right, drafted)
    return found


def test_times_come_first_of_a_call_and_then_of_a_draft() -> None:
    calls, steps = CallTimes(), CallTimes()
    found = DraftCosts(calls, steps, 0.25)
    assert found.length(9) == 0
    calls.add(2, 1.0)
    assert found.length(9) == 3
    assert found.length(2) == 2
    assert found.length(-1) <= 0


def test_a_free_draft_that_is_right_is_as_long_as_may_be() -> None:
    found = learn(costs(1.0, 0.0, 0.001), 8, 8)
    assert found.length(100) == MOST_DRAFTED
    assert found.length(5) == 5
    assert found.reason is None


def test_what_is_seldom_right_is_drafted_shortly_and_what_never_is_rests() -> None:
    seldom = learn(costs(1.0, 0.01, 0.05), 1, 2)
    never = learn(costs(1.0, 0.01, 0.4), 0, 4, 60)
    assert 0 < seldom.length(16) < 8
    lengths = [never.length(16) for _ in range(64)]
    assert sum(lengths) == 2  # another chance, now and then
    assert never.reason is not None
    assert "rests" in never.reason
    assert "1000.0 ms" in never.reason
    assert learn(never, 9, 9, 60).length(16) > 0
    assert never.reason is None


def test_where_no_acceptance_would_pay_it_is_off_for_good() -> None:
    found = learn(costs(1.0, 0.3, 1.1), 4, 4)
    assert [found.length(16) for _ in range(100)] == [0] * 100
    assert found.reason is not None
    assert "off" in found.reason


@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_the_median_of_the_last_calls_counts(slower: float) -> None:
    times = CallTimes()
    for _ in range(9):
        times.add(2, 1.0)
    times.add(2, 50.0)
    assert times.medians(2) == {2: 1.0}
    for _ in range(9):
        times.add(2, slower)
    assert times.medians(2) == {2: slower}
    assert times.medians(1) == {}


def test_a_branch_and_a_step_are_told_as_shares_of_a_call() -> None:
    calls, steps = CallTimes(), CallTimes()
    found = DraftCosts(calls, steps, 0.01)
    assert found.shares() is None
    calls.add(2, 1.0)
    steps.add(1, 0.1)
    assert found.shares() == pytest.approx((0.1, 0.01))  # until branches are timed
    for branches, seconds in ((3, 1.2), (6, 1.8)):
        calls.add(2 + branches, seconds)
    # By hand: of 2, 5 and 8 rows a line of slope 0.8 / 6, which has 14 / 15 at two rows.
    assert found.shares() == pytest.approx((0.1 / (14 / 15), (0.8 / 6) / (14 / 15)))
    calls.add(18, 0.001)
    assert found.shares() == pytest.approx((0.1 / (14 / 15), (0.8 / 6) / (14 / 15)))
    for _ in range(9):
        calls.add(17, 0.5)
    assert found.shares()[1] == 0.0  # type: ignore[index]


def test_guesses_are_as_likely_as_the_draft_says_until_they_are_counted() -> None:
    odds = GuessOdds()
    assert odds.of(0, 0.7) == pytest.approx(0.7)
    for n in range(400):
        odds.learn(0, 0.72, n % 10 < 9)
        odds.learn(1, 0.15, n % 20 == 0)
    assert odds.of(0, 0.75) == pytest.approx(0.9, abs=0.03)
    assert odds.first == pytest.approx(0.9, abs=0.03)
    assert odds.of(1, 0.15) == pytest.approx(0.05, abs=0.03)
    assert odds.of(2, 0.15) == pytest.approx(0.15)  # another rank
    assert odds.of(1, 0.55) == pytest.approx(0.55)  # and other weights
    for _ in range(600):
        odds.learn(0, 0.72, False)
    assert odds.of(0, 0.75) < 0.2  # what was counted long ago weighs less
