"""The knapsack, against every choice there is."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.plan import knapsack
from pipeline.compress.plan.knapsack import _RELATIVE_GAP, allocate, undominated
from pipeline.compress.plan.plan import _stored_parameters

SIZES = st.integers(1, 60)
LOSSES = st.floats(0, 100, allow_subnormal=False).map(lambda loss: round(loss, 6))
GROUP = st.lists(st.tuples(SIZES, LOSSES), min_size=1, max_size=6)
PROBLEM = st.lists(GROUP, min_size=1, max_size=4)
Groups = list[list[tuple[int, float]]]


def columns(groups: Groups) -> tuple[list[np.ndarray], list[np.ndarray]]:
    sizes = [np.array([size for size, _ in group]) for group in groups]
    return sizes, [np.array([loss for _, loss in group]) for group in groups]


def totals(groups: Groups, choice: tuple[int, ...] | list[int]) -> tuple[int, float]:
    chosen = [group[c] for group, c in zip(groups, choice, strict=True)]
    return sum(size for size, _ in chosen), sum(loss for _, loss in chosen)


def least_loss(groups: Groups, budget: int) -> float:
    """By trying every choice."""
    every = (totals(groups, choice) for choice in itertools.product(*map(range, map(len, groups))))
    return min(loss for size, loss in every if size <= budget)


@settings(max_examples=150, deadline=None)
@given(groups=PROBLEM, share=st.floats(0, 1))
def test_the_choice_is_within_the_budget_and_loses_as_little_as_any(
    groups: Groups, share: float
) -> None:
    smallest = sum(min(size for size, _ in group) for group in groups)
    largest = sum(max(size for size, _ in group) for group in groups)
    budget = smallest + int(share * (largest - smallest))
    size, loss = totals(groups, allocate(*columns(groups), budget))
    assert size <= budget
    # The solver stops within its gap, and takes what is below 1e-6 of the largest loss for zero.
    slack = 1e-6 * max(loss for group in groups for _, loss in group)
    assert loss <= least_loss(groups, budget) * (1 + _RELATIVE_GAP) + slack


@pytest.mark.parametrize("budget", [10**3, 10**6, 10**9, 10**11])
def test_one_number_over_a_large_budget_is_over_it(budget: int) -> None:
    # As a fraction of the budget it is below what solvers take for zero.
    groups = [[(budget // 2, 1.0), (budget // 2 + 1, 0.0)], [(budget // 2, 1.0)]]
    size, _ = totals(groups, allocate(*columns(groups), budget))
    assert size <= budget


def concave_problem() -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Ranks of block-skip groups: sizes r (m + n - r), losses that fall at different rates."""
    ranks = np.arange(1, 33)
    size = np.array([_stored_parameters("skip", 64, 32, int(r)) for r in ranks])
    losses = [rate * np.exp(-ranks / rate) for rate in (1.0, 2.0, 4.0, 8.0, 16.0)]
    return [size] * len(losses), losses, int(0.6 * 64 * 32 * len(losses))


def test_it_loses_less_than_the_same_rank_everywhere() -> None:
    sizes, losses, budget = concave_problem()
    same = int((sizes[0] * len(sizes) <= budget).sum()) - 1
    chosen = allocate(sizes, losses, budget)
    lost = sum(e[c] for e, c in zip(losses, chosen, strict=True))
    assert lost < 0.7 * sum(e[same] for e in losses)
    assert sum(s[c] for s, c in zip(sizes, chosen, strict=True)) <= budget


def test_what_the_budget_leaves_is_spent() -> None:
    sizes, losses, budget = concave_problem()
    chosen = allocate(sizes, losses, budget)
    left = budget - sum(int(s[c]) for s, c in zip(sizes, chosen, strict=True))
    steps = [s[c + 1] - s[c] for s, c in zip(sizes, chosen, strict=True) if c + 1 < len(s)]
    assert 0 <= left < min(steps)


def test_a_budget_for_everything_buys_the_least_loss_of_every_group() -> None:
    sizes, losses, _ = concave_problem()
    chosen = allocate(sizes, losses, sum(int(s.max()) for s in sizes))
    assert chosen == [int(e.argmin()) for e in losses]


def test_losses_of_any_scale_are_told_apart() -> None:
    sizes, losses, budget = concave_problem()
    expected = allocate(sizes, losses, budget)
    for scale in (1e-9, 1e9):
        found = allocate(sizes, [scale * e for e in losses], budget)
        lost, least = (
            sum(e[c] for e, c in zip(losses, chosen, strict=True)) for chosen in (found, expected)
        )
        assert lost == pytest.approx(least, rel=2 * _RELATIVE_GAP)


def test_losses_that_are_all_zero_have_a_choice() -> None:
    sizes = [np.array([1, 2]), np.array([3, 4])]
    chosen = allocate(sizes, [np.zeros(2), np.zeros(2)], 5)
    assert sum(int(s[c]) for s, c in zip(sizes, chosen, strict=True)) <= 5


def test_a_budget_below_the_smallest_choices_is_refused_with_their_size() -> None:
    with pytest.raises(ValueError, match="need 7 of 6"):
        allocate([np.array([4, 9]), np.array([3])], [np.zeros(2), np.zeros(1)], 6)


@given(group=GROUP)
def test_undominated_are_those_that_no_other_beats_by_rising_size(
    group: list[tuple[int, float]],
) -> None:
    front = undominated(*(np.array(column) for column in zip(*group, strict=True)))
    kept = [group[i] for i in front]
    assert kept == sorted(kept)
    assert all(a[1] > b[1] for a, b in itertools.pairwise(kept))
    for size, loss in group:
        assert any(s <= size and e <= loss for s, e in kept)


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    # Results go to stdout. HiGHS announces there that it repairs a choice, as it does for this one.
    generator = np.random.default_rng(220)
    sizes = [np.sort(generator.integers(1, 10**6, 100)) for _ in range(12)]
    losses = [np.sort(generator.random(100) ** 4)[::-1] for _ in range(12)]
    print("before")
    allocate(sizes, losses, int(0.6 * sum(int(s.max()) for s in sizes)))
    ctypes.CDLL(None).fflush(None)
    print("after")
    assert capfd.readouterr().out.split() == ["before", "after"]


def many_groups() -> tuple[list[np.ndarray], list[np.ndarray], int]:
    rng = np.random.default_rng(0)
    sizes = [np.sort(rng.integers(1, 1000, 40)) for _ in range(60)]
    losses = [np.sort(rng.exponential(1, 40))[::-1].copy() for _ in range(60)]
    return sizes, losses, sum(int(s[20]) for s in sizes)


def test_a_solver_that_is_stopped_with_a_poor_choice_costs_one_step_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As HiGHS is by its time limit, on a machine that does other things too."""
    sizes, losses, budget = many_groups()

    def lost(chosen: list[int]) -> float:
        assert sum(int(s[c]) for s, c in zip(sizes, chosen, strict=True)) <= budget
        return float(sum(e[c] for e, c in zip(losses, chosen, strict=True)))

    best = lost(allocate(sizes, losses, budget))
    monkeypatch.setattr(knapsack, "_solve", lambda sizes, *_: ([0] * len(sizes), False))
    told: list[str] = []
    found = lost(allocate(sizes, losses, budget, told.append))
    assert best <= found <= 1.02 * best
    assert len(told) == 1
    assert float(told[0].split("within ")[1].split("%")[0]) / 100 >= 1 - best / found


def test_a_solver_that_is_stopped_with_no_choice_leaves_that_of_equal_slopes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, losses, budget = many_groups()
    monkeypatch.setattr(knapsack, "_TIME_LIMIT_S", 0.0)
    told: list[str] = []
    chosen = allocate(sizes, losses, budget, told.append)
    assert sum(int(s[c]) for s, c in zip(sizes, chosen, strict=True)) <= budget
    assert "stopped after 0 s" in told[0]


def test_a_proof_is_found_among_few_candidates_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the solver is left with is a small part of all, and holds a choice as good."""
    sizes, losses, budget = many_groups()
    seen: list[int] = []
    solve, told = knapsack._solve, list[str]()

    def watched(*arguments: Any) -> Any:
        seen.append(sum(map(len, arguments[0])))
        return solve(*arguments)

    monkeypatch.setattr(knapsack, "_solve", watched)
    few = allocate(sizes, losses, budget, told.append)
    monkeypatch.setattr(
        knapsack, "_worth_trying", lambda costs, _: [np.arange(len(c)) for c in costs]
    )
    every = allocate(sizes, losses, budget, told.append)
    assert not told
    assert seen[0] < seen[1] / 2
    lost = [sum(e[c] for e, c in zip(losses, chosen, strict=True)) for chosen in (few, every)]
    assert lost[0] == pytest.approx(lost[1], rel=_RELATIVE_GAP)
