"""Block skipping is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.factorize.factors import _quick_pivots, _skip_block_, _strong_pivots
from pipeline.compress.plan.plan import _stored_parameters


def factors(rows: int, columns: int, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, rank, dtype=torch.float64, generator=generator)
    return b, torch.randn(rank, columns, dtype=torch.float64, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(2, 40),
    part=st.floats(0.05, 1.0),
    seed=st.integers(0, 10_000),
)
def test_skipping_the_block_changes_nothing_in_float64(
    rows: int, columns: int, part: float, seed: int
) -> None:
    rank = max(1, int(part * columns))
    b, a = factors(rows, columns, rank, seed)
    skip = _skip_block_(b.clone(), a)
    x = torch.randn(columns, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ordered = x[skip.permutation]
    y = skip.up @ (ordered[:rank] + skip.down @ ordered[rank:])
    expected = b @ (a @ x)
    assert (y - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


def test_up_is_exactly_the_pivot_columns_of_the_product() -> None:
    b, a = factors(9, 14, 5, 0)
    skip = _skip_block_(b.clone(), a)
    assert skip.permutation is not None
    torch.testing.assert_close(skip.up, (b @ a)[:, skip.permutation[:5]], rtol=0, atol=1e-12)


def test_dense_gives_the_product_back() -> None:
    b, a = factors(9, 14, 5, 1)
    torch.testing.assert_close(_skip_block_(b.clone(), a).product(), b @ a, rtol=0, atol=1e-12)


def test_full_rank_skip_stores_the_dense_matrix_and_no_interpolation() -> None:
    b, a = factors(6, 10, 10, 2)
    skip = _skip_block_(b.clone(), a)
    assert skip.down.numel() == 0
    assert skip.up.numel() == _stored_parameters("skip", 6, 10, 10) == 60
    torch.testing.assert_close(skip.product(), b @ a, rtol=0, atol=1e-12)


def test_it_stores_as_many_numbers_as_promised() -> None:
    b, a = factors(9, 14, 5, 3)
    skip = _skip_block_(b.clone(), a)
    assert skip.up.numel() + skip.down.numel() == _stored_parameters("skip", 9, 14, 5)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        _skip_block_(torch.ones(3, 2), torch.ones(3, 4))


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
    permutation, interpolation = _strong_pivots(a)
    assert sorted(permutation.tolist()) == list(range(rank + extra))
    assert interpolation.shape == (rank, extra)
    assert interpolation.abs().max().item() <= 2.0 if extra else True


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 16), extra=st.integers(1, 24), seed=st.integers(0, 10_000))
def test_pivot_columns_reproduce_all_others(rank: int, extra: int, seed: int) -> None:
    a = wide(rank, rank + extra, seed)
    permutation, interpolation = _strong_pivots(a)
    pivots, others = a[:, permutation[:rank]], a[:, permutation[rank:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-10)


def test_kahans_matrix_needs_swaps_and_gets_them() -> None:
    permutation, interpolation = _strong_pivots(kahan(60, 40))
    assert interpolation.abs().max().item() <= 2.0
    assert len(set(permutation.tolist())) == 100


def test_a_smaller_bound_is_kept_too() -> None:
    _, interpolation = _strong_pivots(wide(12, 40, 3), bound=1.05)
    assert interpolation.abs().max().item() <= 1.05


def test_a_bound_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than 1"):
        _strong_pivots(wide(2, 4, 0), bound=1.0)


@pytest.mark.parametrize("dependent", [torch.zeros(8), torch.arange(8.0)])
def test_a_matrix_without_full_row_rank_is_still_interpolated_exactly(
    dependent: torch.Tensor,
) -> None:
    a = wide(3, 8, 0)
    a[1:] = dependent.double()
    permutation, interpolation = _strong_pivots(a)
    assert interpolation.abs().max().item() <= 2.0
    pivots, others = a[:, permutation[:3]], a[:, permutation[3:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-12)


def test_more_rows_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="more rows"):
        _strong_pivots(torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (1, 9), (7, 7), (12, 40), (60, 200)])
@pytest.mark.parametrize("seed", range(5))
def test_graded_columns_of_any_shape_end_within_the_bound(
    rank: int, columns: int, seed: int
) -> None:
    a = wide(rank, columns, seed)
    permutation, interpolation = _strong_pivots(a)
    assert sorted(permutation.tolist()) == list(range(columns))
    assert interpolation.abs().amax().item() <= 2.0 if columns > rank else True
    pivots, others = a[:, permutation[:rank]], a[:, permutation[rank:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rank", "columns"), [(1, 1), (7, 7), (12, 40), (60, 200)])
def test_quick_pivots_reproduce_all_others_too(rank: int, columns: int) -> None:
    a = wide(rank, columns, 0)
    permutation, interpolation = _quick_pivots(a)
    assert sorted(permutation.tolist()) == list(range(columns))
    pivots, others = a[:, permutation[:rank]], a[:, permutation[rank:]]
    torch.testing.assert_close(pivots @ interpolation, others, rtol=0, atol=1e-9)
