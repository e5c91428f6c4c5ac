"""Plans that are searched: their budget, their shape and what they are expected to cost."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.compress.plan import rank_search as search
from pipeline.compress.plan.plan import RankPlan, uniform_plan
from pipeline.compress.plan.rank_search import (
    Curves,
    _group_candidates,
    _partitions,
    searched_plan,
    stacks_of,
)
from pipeline.errors import UsageError
from pipeline.model.structure import Group, Layer
from tests.support.families import FAMILIES
from tests.support.tiny_survey import surveyed


def plan_of(family: str, kept: float, **switches: bool | int) -> RankPlan:
    tiny = surveyed(family)
    return searched_plan(tiny.layers, tiny.survey.curves, kept, **switches)  # type: ignore[arg-type]


def expected_kl(plan: RankPlan, curves: Curves) -> float:
    return sum(0.0 if g.form == "dense" else curves[g.members][g.rank] for g in plan.groups)


def random_group(heights: list[int], width: int, seed: int) -> tuple[Group, Curves]:
    """A group whose stacks have losses that fall from a random start to zero at full rank."""
    generator = np.random.default_rng(seed)
    members = tuple(f"layer.{place}" for place in range(len(heights)))
    group = Group(members, width, tuple(heights))
    curves = {}
    for stack in stacks_of(group, cat=True):
        full = min(width, sum(h for m, h in zip(members, heights, strict=True) if m in stack))
        curves[stack] = np.r_[np.sort(generator.random(full) + 1e-3)[::-1], 0.0]
    return group, curves


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [0.35, 0.7, 0.95])
def test_the_budget_is_respected_and_nearly_all_of_it_is_used(family: str, kept: float) -> None:
    plan = plan_of(family, kept)
    assert 0.99 * kept <= plan.kept_fraction <= kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("switches", [{}, {"cat": False}, {"skip": False}, {"multiple": 4}])
def test_every_matrix_is_in_exactly_one_stack_of_its_layer(
    family: str, switches: dict[str, int]
) -> None:
    plan = plan_of(family, 0.7, **switches)
    layers = surveyed(family).layers
    assert list(plan.layers) == [layer.name for layer in layers]
    for layer in layers:
        planned = [member for group in plan.layers[layer.name] for member in group.members]
        assert sorted(planned) == sorted(m for group in layer.groups for m in group.members)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_expected_to_cost_less_than_the_same_fraction_everywhere(family: str) -> None:
    tiny = surveyed(family)
    best = expected_kl(plan_of(family, 0.7), tiny.survey.curves)
    for cat in (True, False):
        uniform = uniform_plan(tiny.layers, 0.7, cat=cat)
        # It stays below the budget that the search was given.
        assert uniform.kept_fraction <= 0.7
        assert best < expected_kl(uniform, tiny.survey.curves)


def test_each_group_says_what_it_is_expected_to_cost() -> None:
    plan = plan_of("llama", 0.7)
    curves = surveyed("llama").survey.curves
    for group in plan.groups:
        cost = 0.0 if group.form == "dense" else curves[group.members][group.rank]
        assert group.expected_kl == cost
        assert (group.reason is None) == (group.form != "dense")


def test_without_cat_no_matrix_shares_its_factor_and_with_it_some_do() -> None:
    assert {len(group.members) for group in plan_of("llama", 0.6, cat=False).groups} == {1}
    assert max(len(group.members) for group in plan_of("llama", 0.6).groups) > 1


def test_sharing_is_a_choice_that_never_costs() -> None:
    curves = surveyed("llama").survey.curves
    shared, alone = (expected_kl(plan_of("llama", 0.6, cat=cat), curves) for cat in (True, False))
    # The solver stops within 1e-4 of the least.
    assert shared <= alone * (1 + 1e-4)


@pytest.mark.parametrize(("skip", "form"), [(True, "skip"), (False, "low_rank")])
def test_factors_have_the_form_that_was_asked_for_and_save_something(skip: bool, form: str) -> None:
    groups = plan_of("qwen2", 0.6, skip=skip).groups
    assert {group.form for group in groups} - {"dense"} == {form}
    assert all(g.kept_parameters < g.dense_parameters for g in groups if g.form == form)


@pytest.mark.parametrize("multiple", [2, 8])
def test_ranks_are_multiples(multiple: int) -> None:
    factored = [g for g in plan_of("llama", 0.6, multiple=multiple).groups if g.form != "dense"]
    assert factored
    assert all(group.rank % multiple == 0 for group in factored)


def test_a_plan_reads_back_the_same_with_its_expected_cost(tmp_path: Path) -> None:
    plan = plan_of("gemma3_text", 0.7)
    plan.save(tmp_path / "plan.json")
    again = RankPlan.load(tmp_path / "plan.json", surveyed("gemma3_text").layers)
    assert again == plan
    assert any(group.expected_kl for group in again.groups)


@pytest.mark.parametrize("switches", [{}, {"skip": False}, {"cat": False}, {"multiple": 4}])
def test_too_small_a_budget_is_refused_with_one_that_works(switches: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="No plan keeps so little") as caught:
        plan_of("llama", 0.001, **switches)
    found = re.search(r"at least (0\.\d+)", str(caught.value.details["expected"]))
    assert found
    feasible = float(found[1])
    assert plan_of("llama", feasible, **switches).kept_fraction <= feasible
    with pytest.raises(UsageError):
        plan_of("llama", feasible - 2e-4, **switches)


@settings(max_examples=60, deadline=None)
@example(rows=10, columns=20)  # 0.145 x 200 = 28.999999999999996, and rank 1 takes 29
@given(rows=st.integers(2, 60), columns=st.integers(2, 60))
def test_the_budget_it_names_works_whatever_the_shape(rows: int, columns: int) -> None:
    group, curves = random_group([rows], columns, 0)
    layers = [Layer("layer", (group,))]
    with pytest.raises(UsageError) as caught:
        searched_plan(layers, curves, 1e-6)
    feasible = float(re.findall(r"at least (\S+)", str(caught.value.details["expected"]))[0])
    assert searched_plan(layers, curves, feasible).kept_fraction <= feasible


@given(full=st.integers(1, 20_000), multiple=st.integers(1, 64))
def test_a_grid_of_ranks_is_no_finer_than_meant_and_of_tiles_where_it_is_coarse(
    full: int, multiple: int
) -> None:
    step = search._rank_step(full, multiple)
    assert step % multiple == 0
    assert full / step <= search._RANKS_PER_STACK
    assert step % search._TILE == 0 or step <= math.lcm(multiple, search._TILE) / 2
    if full <= search._RANKS_PER_STACK:
        assert search._rank_step(full, 1) == 1


def test_three_matrices_are_divided_in_every_way_and_more_in_two() -> None:
    assert sorted(_partitions(("q", "k", "v"), cat=True)) == [
        (("k", "v"), ("q",)),
        (("q",), ("k",), ("v",)),
        (("q", "k"), ("v",)),
        (("q", "k", "v"),),
        (("q", "v"), ("k",)),
    ]
    four = ("a", "b", "c", "d")
    assert list(_partitions(four, cat=True)) == [(four,), (("a",), ("b",), ("c",), ("d",))]
    assert list(_partitions(four, cat=False)) == [(("a",), ("b",), ("c",), ("d",))]
    assert list(_partitions(("o",), cat=True)) == [(("o",),)]


@settings(max_examples=25, deadline=None)
@given(
    heights=st.lists(st.integers(2, 10), min_size=1, max_size=3),
    width=st.integers(2, 12),
    skip=st.booleans(),
    seed=st.integers(0, 100),
)
def test_candidates_rise_in_size_fall_in_loss_and_end_dense(
    heights: list[int], width: int, skip: bool, seed: int
) -> None:
    group, curves = random_group(heights, width, seed)
    found = _group_candidates(group, curves, cat=True, skip=skip, multiple=1)
    assert all(a.size < b.size and a.loss > b.loss for a, b in pairwise(found))
    assert found[-1].loss == 0
    assert {stack.form for stack in found[-1].stacks} == {"dense"}
    for candidate in found:
        assert candidate.size == sum(stack.kept_parameters for stack in candidate.stacks)
        assert candidate.loss == pytest.approx(sum(s.expected_kl or 0 for s in candidate.stacks))
        members = [member for stack in candidate.stacks for member in stack.members]
        assert sorted(members) == sorted(group.members)


def test_a_group_has_no_more_candidates_than_the_solver_is_meant_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, curves = random_group([40, 40, 40], 60, 0)
    every = _group_candidates(group, curves, cat=True, skip=True, multiple=1)
    monkeypatch.setattr(search, "_CANDIDATES_PER_GROUP", 20)
    fewer = _group_candidates(group, curves, cat=True, skip=True, multiple=1)
    assert len(every) > len(fewer) == 20
    assert (fewer[0], fewer[-1]) == (every[0], every[-1])
