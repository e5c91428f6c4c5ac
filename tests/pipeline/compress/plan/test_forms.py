"""Ranks and the numbers they store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compress.factorize.factors import Form
from pipeline.compress.plan.plan import _reason_to_stay_dense, _stored_parameters, rank_for_kept

SIZES = st.integers(2, 5000)
FACTORED: list[Form] = ["skip", "low_rank"]


@given(rows=SIZES, columns=SIZES, kept=st.floats(0.01, 1.0), form=st.sampled_from(FACTORED))
def test_the_budget_is_kept_and_one_more_rank_would_break_it(
    rows: int, columns: int, kept: float, form: Form
) -> None:
    rank = rank_for_kept(form, rows, columns, kept)
    budget = kept * rows * columns
    assert _stored_parameters(form, rows, columns, rank) <= budget * (1 + 1e-9)
    if rank < min(rows, columns):
        assert _stored_parameters(form, rows, columns, rank + 1) > budget * (1 - 1e-9)


@pytest.mark.parametrize(
    ("rows", "columns", "kept", "plain", "skip"),
    [
        (4096, 4096, 0.8, 1638, 2264),
        (12288, 4096, 0.7, 2150, 2546),
        (22016, 4096, 0.6, 2072, 2269),
        (960, 576, 0.8, 288, 384),
        (3072, 576, 0.8, 388, 441),
    ],
)
def test_ranks_match_the_published_table(
    rows: int, columns: int, kept: float, plain: int, skip: int
) -> None:
    assert rank_for_kept("low_rank", rows, columns, kept) == plain
    assert rank_for_kept("skip", rows, columns, kept) == skip


def test_skip_at_full_rank_stores_what_the_dense_matrix_does() -> None:
    assert _stored_parameters("skip", 70, 50, 50) == _stored_parameters("dense", 70, 50, 0) == 3500


def test_ranks_are_rounded_down_to_the_multiple() -> None:
    assert rank_for_kept("skip", 960, 576, 0.83, multiple=16) % 16 == 0
    assert rank_for_kept("skip", 960, 576, 0.83, 16) <= rank_for_kept("skip", 960, 576, 0.83)


@pytest.mark.parametrize("kept", [0.0, -0.1, 1.01, float("nan")])
def test_a_kept_fraction_outside_the_range_is_refused(kept: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        rank_for_kept("skip", 4, 4, kept)


def test_a_group_stays_dense_when_low_rank_would_not_pay() -> None:
    assert "nothing would be left" in str(_reason_to_stay_dense("skip", 4, 4, 0))
    assert "full rank" in str(_reason_to_stay_dense("skip", 8, 4, 4))
    assert "would store" in str(_reason_to_stay_dense("low_rank", 10, 10, 9))
    assert _reason_to_stay_dense("skip", 10, 10, 9) is None


def test_a_rank_beyond_the_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 4\]"):
        _stored_parameters("skip", 8, 4, 5)
