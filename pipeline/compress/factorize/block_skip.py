"""Block skipping: spend the r x r freedom of a product B A on an identity block.

With A P = [A1 A2], A' = A1^-1 A2 and B' = B A1: B A x = B' (x1 + A' x2) exactly, [x1; x2] = P^T x.
It stores r (m + n - r) numbers instead of r (m + n).

Strong rank-revealing QR: r columns of A in which every other column is written with |a| <= 2.

Gu and Eisenstat 1996. For A of full row rank r the criterion is max |A1^-1 A2| <= f: as long as an
entry p of A1^-1 A2 exceeds f, swapping its two columns multiplies |det A1| by |p| > f, so the loop
ends. LU with partial pivoting, which runs at the speed of the matrix units, gives a start from
which few swaps remain; column-pivoted QR leaves fewer, and runs at the speed of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_BOUND = 2.0
# The loop aims a little below the bound, so that recomputing A' afterwards cannot cross it.
_SAFETY = 1.0 - 1e-6


def _strong_pivots(a: torch.Tensor, bound: float = _BOUND) -> tuple[torch.Tensor, torch.Tensor]:
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
    basis = torch.linalg.qr(a.T.double())[0].T
    permutation, interpolation = quick_pivots(basis)
    while interpolation.numel() and float(interpolation.abs().max()) > bound:
        table = interpolation.numpy().copy()
        swapped = _swap_until_bounded(table, permutation.numpy(), bound * _SAFETY)
        permutation = torch.from_numpy(swapped)
        pivots, others = permutation[:rank], permutation[rank:]
        interpolation = torch.linalg.solve(basis[:, pivots], basis[:, others])
    return permutation, interpolation.contiguous()


def quick_pivots(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by LU with partial pivoting alone: without the bound.

    From P L U = A^T: its rows in the order of P, and A' = L1^-T L2^T. Good enough for what is
    estimated from the factors, not for what is stored.
    """
    rank = a.shape[0]
    factored, swaps = torch.linalg.lu_factor(a.T.double())
    order = torch.arange(a.shape[1])
    for row, other in enumerate((swaps - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    triangle = factored[:rank].tril(-1).T
    interpolation = torch.linalg.solve_triangular(
        triangle, factored[rank:].T, upper=True, unitriangular=True
    )
    return order, interpolation


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


@dataclass(frozen=True)
class _SkipFactors:
    """The factors of y = B' (x1 + A' x2).

    Attributes:
        permutation: int64 [n]; x1 = x[permutation[:r]], x2 = x[permutation[r:]].
        interpolation: A', float64 [r, n - r].
        up: B', float64 [m, r]; exactly the pivot columns of B A.
    """

    permutation: torch.Tensor
    interpolation: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        """Number of pivot columns, r."""
        return self.up.shape[1]

    def dense(self) -> torch.Tensor:
        """The product B' [I A'] P^T, float64 [m, n]."""
        product = torch.cat([self.up, self.up @ self.interpolation], dim=1)
        return product[:, torch.argsort(self.permutation)]


def skip_block(b: torch.Tensor, a: torch.Tensor, bound: float = _BOUND) -> _SkipFactors:
    """Rewrite a product B A so that r of the inputs pass straight to the latent.

    Args:
        b: B, float64 [m, r].
        a: A, float64 [r, n].
        bound: largest |A'| allowed.

    Raises:
        ValueError: shapes that do not fit.
    """
    if b.shape[1] != a.shape[0]:
        raise ValueError(f"B {tuple(b.shape)} and A {tuple(a.shape)} do not fit")
    permutation, interpolation = _strong_pivots(a, bound)
    up = b.double() @ a.double()[:, permutation[: a.shape[0]]]
    return _SkipFactors(permutation, interpolation, up)
