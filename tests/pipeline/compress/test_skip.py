"""Block skipping is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.rank import stored_parameters
from pipeline.compress.skip import skip_block


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
    skip = skip_block(b, a)
    x = torch.randn(columns, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ordered = x[skip.permutation]
    y = skip.up @ (ordered[:rank] + skip.interpolation @ ordered[rank:])
    expected = b @ (a @ x)
    assert (y - expected).abs().max() <= 1e-10 * max(1.0, expected.abs().max().item())


def test_up_is_exactly_the_pivot_columns_of_the_product() -> None:
    b, a = factors(9, 14, 5, 0)
    skip = skip_block(b, a)
    torch.testing.assert_close(skip.up, (b @ a)[:, skip.permutation[:5]], rtol=0, atol=1e-12)


def test_dense_gives_the_product_back() -> None:
    b, a = factors(9, 14, 5, 1)
    torch.testing.assert_close(skip_block(b, a).dense(), b @ a, rtol=0, atol=1e-12)


def test_full_rank_skip_stores_the_dense_matrix_and_no_interpolation() -> None:
    b, a = factors(6, 10, 10, 2)
    skip = skip_block(b, a)
    assert skip.interpolation.numel() == 0
    assert skip.up.numel() == stored_parameters("skip", 6, 10, 10) == 60
    torch.testing.assert_close(skip.dense(), b @ a, rtol=0, atol=1e-12)


def test_it_stores_as_many_numbers_as_promised() -> None:
    b, a = factors(9, 14, 5, 3)
    skip = skip_block(b, a)
    assert skip.up.numel() + skip.interpolation.numel() == stored_parameters("skip", 9, 14, 5)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        skip_block(torch.ones(3, 2), torch.ones(3, 4))
