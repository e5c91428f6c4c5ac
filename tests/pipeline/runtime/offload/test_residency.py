"""As many layers stay as fit, in full, and those that are read lie between them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.errors import UsageError
from pipeline.runtime.offload.residency import Budget, _resident_layers


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_as_many_stay_as_fit_and_one_more_would_not(layers: int) -> None:
    for count in range(layers + 1):
        for spare in (0, 9):
            assert len(_resident_layers([10] * layers, 10 * count + spare)) == count


def test_they_are_spread_over_the_model() -> None:
    found = sorted(_resident_layers([1] * 30, 10))
    assert {b - a for a, b in pairwise(found)} == {3}


def test_of_layers_of_several_sizes_no_more_stay_than_fit() -> None:
    sizes = [5, 50, 5, 50, 5, 50]
    for budget in range(200):
        assert sum(sizes[n] for n in _resident_layers(sizes, budget)) <= budget
    assert _resident_layers(sizes, sum(sizes)) == frozenset(range(6))


@pytest.mark.parametrize("total", [100, 129, 130, 145, 159, 160, 1000])
def test_a_plan_keeps_within_its_budget_and_says_the_least_that_would_do(total: int) -> None:
    budget = Budget(total * 1_000_000, "--vram", "what else there is")
    sizes, fixed = [10_000_000] * 6, 100_000_000
    if total < 120:
        with pytest.raises(UsageError, match="too small") as caught:
            budget.plan(sizes, fixed)
        assert caught.value.details["where"] == "--vram"
        assert caught.value.details["expected"].startswith("at least 120 MB: 20 for 2 layers")
        return
    plan = budget.plan(sizes, fixed)
    # Without a ring all of them fit; with one, two buffers of it go first.
    assert len(plan.resident) == (6 if total >= 160 else (total - 120) // 10)
    assert plan.held_bytes <= budget.held_bytes
