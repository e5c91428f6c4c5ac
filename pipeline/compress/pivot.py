"""Strong rank-revealing QR: r columns of A in which every other column is written with |a| <= 2.

Gu and Eisenstat 1996. For A of full row rank r the criterion is max |A1^-1 A2| <= f: as long as an
entry p of A1^-1 A2 exceeds f, swapping its two columns multiplies |det A1| by |p| > f, so the loop
ends. Column-pivoted QR gives a start from which few swaps, if any, remain. It runs at the speed of
memory; for wide matrices LU with partial pivoting, which runs at that of the matrix units, gives a
start from which a few more remain.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

BOUND = 2.0
WIDE = 2048
# The loop aims a little below the bound, so that recomputing A' afterwards cannot cross it.
SAFETY = 1.0 - 1e-6


def strong_pivots(a: torch.Tensor, bound: float = BOUND) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose pivot columns of A and write the others in them.

    Args:
        a: A, float64 [r, n], r <= n. It may lack full row rank: the pivots are then those of a
            larger row space, and the identity A2 = A1 A' still holds.
        bound: f, larger than 1.

    Returns:
        permutation: int64 [n], the r pivot columns first.
        interpolation: A' = A1^-1 A2, float64 [r, n - r], max |A'| <= bound.

    Raises:
        ValueError: a bound of 1 or less, or more rows than columns.
    """
    rank, columns = a.shape
    if bound <= 1:
        raise ValueError(f"bound {bound} must be larger than 1, or the swaps need not end")
    if rank > columns:
        raise ValueError(f"A {tuple(a.shape)} has more rows than columns")
    # A' does not change when A is multiplied from the left, so work on an orthonormal row basis:
    # its conditioning, not that of A, then limits the accuracy.
    basis = scipy.linalg.qr(a.T.double().numpy(), mode="economic")[0].T
    permutation, interpolation = (_start_by_lu if columns > WIDE else _start_by_qr)(basis)
    while np.abs(interpolation).max(initial=0.0) > bound:
        permutation = _swap_until_bounded(interpolation, permutation, bound * SAFETY)
        pivots, others = permutation[:rank], permutation[rank:]
        interpolation = np.linalg.solve(basis[:, pivots], basis[:, others])
    return torch.from_numpy(permutation.astype(np.int64)), torch.from_numpy(interpolation)


def _start_by_qr(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pivot columns first, int [n], and the interpolation [r, n - r] of the others."""
    rank = len(basis)
    triangle, permutation = scipy.linalg.qr(basis, mode="r", pivoting=True)
    return permutation, scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:])


def _start_by_lu(basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same from P L U = basis^T: its rows in the order of P, A' = L1^-T L2^T."""
    rank = len(basis)
    place, lower, _ = scipy.linalg.lu(basis.T, p_indices=True)
    permutation = np.argsort(place)
    # `lower` is in the order of elimination already: unit triangle first.
    interpolation = scipy.linalg.solve_triangular(
        lower[:rank].T, lower[rank:].T, unit_diagonal=True
    )
    return permutation, interpolation


def _swap_until_bounded(table: np.ndarray, permutation: np.ndarray, bound: float) -> np.ndarray:
    """Exchange columns until no entry of `table` (changed in place) exceeds `bound`."""
    permutation = permutation.copy()
    rank = table.shape[0]
    while True:
        row, column = np.unravel_index(np.abs(table).argmax(), table.shape)
        entry = table[row, column]
        if abs(entry) <= bound:
            return permutation
        pivot_row = table[row] / entry
        pivot_column = table[:, column].copy()
        table -= np.outer(pivot_column, pivot_row)
        table[row] = pivot_row
        table[:, column] = -pivot_column / entry
        table[row, column] = 1.0 / entry
        permutation[[row, rank + column]] = permutation[[rank + column, row]]
