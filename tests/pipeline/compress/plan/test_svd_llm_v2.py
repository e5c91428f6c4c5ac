"""Ranks by truncation loss, as in SVD-LLM v2."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compress.plan.plan import uniform_plan
from pipeline.compress.plan.svd_llm_v2 import _LEAST_KEPT, _plan_by_loss, _removed_by_loss
from pipeline.model.structure import Group, Layer, decoder_structure
from tests.support.families import FAMILIES, tiny_model

LOSSES = st.lists(st.floats(1e-3, 1e9), min_size=1, max_size=12)


def matrices(count: int, rows: int = 40, columns: int = 30) -> list[Layer]:
    """Layers of one matrix each."""
    return [
        Layer(f"layer{i}", (Group((f"layer{i}.linear",), columns, (rows,)),)) for i in range(count)
    ]


def tails_like(layers: list[Layer], scales: list[float]) -> dict[str, np.ndarray]:
    """Losses that fall by the same factor from rank to rank, from another start in each layer."""
    return {
        member: scale * np.r_[np.exp(-0.1 * np.arange(min(rows, group.in_features))), 0]
        for layer, scale in zip(layers, scales, strict=True)
        for group in layer.groups
        for member, rows in zip(group.members, group.out_features, strict=True)
    }


@given(losses=LOSSES, removed=st.floats(0, 1 - _LEAST_KEPT))
def test_the_mean_removed_is_what_was_asked_for(losses: list[float], removed: float) -> None:
    shares = _removed_by_loss(np.array(losses), removed)
    assert shares.mean() == pytest.approx(removed, abs=1e-9)
    assert (shares >= 0).all()
    assert (shares <= 1 - _LEAST_KEPT + 1e-12).all()


@given(losses=LOSSES, removed=st.floats(0.01, 0.9))
def test_what_loses_less_has_more_removed(losses: list[float], removed: float) -> None:
    shares = _removed_by_loss(np.array(losses), removed)
    by_loss = shares[np.argsort(losses)]
    assert (np.diff(by_loss) <= 1e-12).all()


def test_shares_are_the_published_formula() -> None:
    losses = np.array([10.0, 100.0, 1000.0])
    scores = 1 / np.log(losses)
    expected = 3 * 0.3 * scores / scores.sum()
    np.testing.assert_allclose(_removed_by_loss(losses, 0.3), expected, rtol=1e-12)


@pytest.mark.parametrize("skip", [True, False])
def test_equal_losses_give_the_uniform_plan(skip: bool) -> None:
    layers = matrices(4)
    tails = tails_like(layers, [2.0] * 4)
    assert _plan_by_loss(layers, tails, 1000, 0.7, skip=skip) == uniform_plan(
        layers, 0.7, cat=False, skip=skip
    )


def test_a_layer_that_loses_less_keeps_fewer_ranks() -> None:
    layers = matrices(3)
    plan = _plan_by_loss(layers, tails_like(layers, [1e3, 1.0, 1e6]), 1000, 0.6)
    ranks = [group.rank for group in plan.groups]
    assert ranks[1] < ranks[0] < ranks[2]


def test_kinds_do_not_take_from_one_another() -> None:
    """What one kind of matrix loses does not change the ranks of the other."""
    layers = [
        Layer(f"y{i}", (Group((f"y{i}.a",), 30, (40,)), Group((f"y{i}.b",), 40, (30,))))
        for i in range(3)
    ]
    ranks = []
    for scale in (1.0, 1e6):
        tails = tails_like(layers, [1.0, 2.0, 3.0])
        for layer in layers:
            tails[f"{layer.name}.b"] = scale * tails[f"{layer.name}.b"]
        plan = _plan_by_loss(layers, tails, 1000, 0.6)
        ranks.append([groups[0].rank for groups in plan.layers.values()])
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_plan_is_within_its_budget_and_shares_nothing(
    family: str, skip: bool, multiple: int
) -> None:
    layers = decoder_structure(tiny_model(family, layers=3))
    tails = tails_like(layers, [1.0, 30.0, 900.0])
    plan = _plan_by_loss(layers, tails, 1000, 0.6, skip=skip, multiple=multiple)
    assert plan.kept_fraction <= 0.6
    assert {len(group.members) for group in plan.groups} == {1}
    factored = [group for group in plan.groups if group.form != "dense"]
    assert {group.form for group in factored} == {"skip" if skip else "low_rank"}
    assert all(group.rank % multiple == 0 for group in factored)
