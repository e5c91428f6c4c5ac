"""Claims of strong rank-revealing QR."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.pivot import quick_pivots, strong_pivots


def wide(rank: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -6, columns, dtype=torch.float64)
    return torch.randn(rank, columns, dtype=torch.float64, generator=generator) * scales


def kahan(size: int, extra: int) -> torch.Tensor:
    """Kahan's matrix: column-pivoted QR keeps its order although A1 is nearly singular."""
    sine, cosine = 0.285**0.5, (1 - 0.285) ** 0.5
    upper = torch.eye(size, dtype=torch.float64) - cosine * torch.ones(
        size, size, dtype=torch.float64
    ).triu(1)
    scales = sine ** torch.arange(size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(size, extra, dtype=torch.float64, generator=generator)
    # Slightly graded columns keep the pivoting from being decided by rounding.
    return torch.cat([scales[:, None] * upper * (1 - 1e-7) ** torch.arange(size), 1e-3 * rest], 1)


@settings(max_examples=60, deadline=None)
@given(rank=st.integers(1, 20), extra=st.integers(0, 30), seed=st.integers(0, 10_000))
def test_no_entry_of_the_interpolation_exceeds_two(rank: int, extra: int, seed: int) -> None:
    a = wide(rank, rank + extra, seed)
    permutation, interpolation = strong_pivots(a)
    assert sorted(permutation.tolist()) == list(range(rank + extra))
    assert interpolation.shape == (rank, extra)
    assert interpolation.abs().max().item() <= 2.0 if extra else True


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 16), extra=st.integers(1, 24), seed=st.integers(0, 10_000))
def test_pivot_columns_reproduce_all_others(rank: int, extra: int, seed: int) -> None:
    a = wide(rank, rank + extra, seed)
    permutation, interpolation = strong_pivots(a)
    pivots, others = a[:, permutation[:rank]], a[:, permutation[rank:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-10)


def test_kahans_matrix_needs_swaps_and_gets_them() -> None:
    permutation, interpolation = strong_pivots(kahan(60, 40))
    assert interpolation.abs().max().item() <= 2.0
    assert len(set(permutation.tolist())) == 100


def test_a_smaller_bound_is_kept_too() -> None:
    _, interpolation = strong_pivots(wide(12, 40, 3), bound=1.05)
    assert interpolation.abs().max().item() <= 1.05


def test_a_bound_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than 1"):
        strong_pivots(wide(2, 4, 0), bound=1.0)


@pytest.mark.parametrize("dependent", [torch.zeros(8), torch.arange(8.0)])
def test_a_matrix_without_full_row_rank_is_still_interpolated_exactly(
    dependent: torch.Tensor,
) -> None:
    a = wide(3, 8, 0)
    a[1:] = dependent.double()
    permutation, interpolation = strong_pivots(a)
    assert interpolation.abs().max().item() <= 2.0
    pivots, others = a[:, permutation[:3]], a[:, permutation[3:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-12)


def test_more_rows_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="more rows"):
        strong_pivots(torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (1, 9), (7, 7), (12, 40), (60, 200)])
@pytest.mark.parametrize("seed", range(5))
def test_graded_columns_of_any_shape_end_within_the_bound(
    rank: int, columns: int, seed: int
) -> None:
    a = wide(rank, columns, seed)
    permutation, interpolation = strong_pivots(a)
    assert sorted(permutation.tolist()) == list(range(columns))
    assert interpolation.abs().amax().item() <= 2.0 if columns > rank else True
    pivots, others = a[:, permutation[:rank]], a[:, permutation[rank:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (7, 7), (12, 40), (60, 200)])
def test_quick_pivots_reproduce_all_others_too(rank: int, columns: int) -> None:
    a = wide(rank, columns, 0)
    permutation, interpolation = quick_pivots(a)
    assert sorted(permutation.tolist()) == list(range(columns))
    pivots, others = a[:, permutation[:rank]], a[:, permutation[rank:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-9)
