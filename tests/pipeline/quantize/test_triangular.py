"""Roots in place, and inverses by blocks, are those of the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.quantize import triangular as module
from pipeline.quantize.triangular import cholesky_, invert_into_


def definite(size: int) -> torch.Tensor:
    drawn = torch.randn(
        size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)
    )
    product = drawn @ drawn.T / size
    return (product + product.T) / 2


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_root_is_the_librarys_and_lies_where_the_matrix_lay(size: int) -> None:
    matrix = definite(size)
    expected, place = torch.linalg.cholesky(matrix), matrix.data_ptr()
    root = cholesky_(matrix)
    assert root is not None
    assert torch.equal(root, expected)
    assert root.data_ptr() == place


def test_a_root_is_found_of_columns_that_are_contiguous_too() -> None:
    matrix = definite(9)
    root = cholesky_(matrix.T.contiguous().T)
    assert root is not None
    assert torch.equal(root, torch.linalg.cholesky(matrix))


def test_a_matrix_with_an_eigenvalue_below_zero_has_no_root() -> None:
    assert cholesky_(torch.diag(torch.tensor([1.0, -1.0, 2.0])).double()) is None


@pytest.mark.parametrize(("size", "at_once"), [(1, 4), (8, 4), (9, 4), (11, 4), (13, 64), (50, 7)])
def test_the_inverse_by_blocks_is_the_inverse(
    size: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    lower = torch.linalg.cholesky(definite(size))
    found = np.zeros((size, size), np.float32)
    invert_into_(found, lower)
    np.testing.assert_allclose(found, torch.linalg.inv(lower).numpy(), rtol=1e-6, atol=1e-6)
    assert not np.triu(found, 1).any()
