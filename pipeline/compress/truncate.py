"""Whitened truncation: the rank-r matrix that loses least of W x on average over x.

min over rank r of E |W x - W_r x|^2 = min |(W - W_r) R|_F^2 with S = E[x x^T] = R R, and its value
is the tail of the squared singular values of W R (Eckart-Young). Two equal ways to the optimum:

- m <= n: with W S W^T = U diag(s^2) U^T, W_r = U_r (U_r^T W): no inverse of S is ever needed;
- m > n: with R W^T W R = V diag(s^2) V^T, W_r = (W R V_r) (V_r^T R^-1).

Both are projections, so at full rank the product is W whatever the accuracy of U or V.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.compress.whiten import whitening_roots


@dataclass(frozen=True)
class Spectrum:
    """A matrix in its whitened basis, ready to be cut at any rank.

    Attributes:
        energies: squared singular values of W R in falling order, float64 [min(m, n)].
        left: B at full rank, float64 [m, k].
        right: A at full rank, float64 [k, n].
    """

    energies: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """B [m, rank] and A [rank, n] of the best rank-r product B A."""
        return self.left[:, :rank], self.right[:rank]

    def relative_tail(self, rank: int) -> float:
        """E |W x - W_r x|^2 / E |W x|^2, in [0, 1]."""
        total = self.energies.sum()
        return float(self.energies[rank:].sum() / total) if total > 0 else 0.0


def whitened_spectrum(weight: torch.Tensor, moment: torch.Tensor) -> Spectrum:
    """Decompose a weight in the geometry of its inputs.

    Args:
        weight: W, float [m, n].
        moment: S = E[x x^T], float64 [n, n].

    Raises:
        ValueError: shapes that do not fit, or a moment that is not finite or zero.
    """
    rows, columns = weight.shape
    if moment.shape != (columns, columns):
        raise ValueError(f"moment {tuple(moment.shape)} does not fit weight {(rows, columns)}")
    weight = weight.double()
    if rows <= columns:
        if not torch.isfinite(moment).all():
            raise ValueError("the second moment holds NaN or infinite values")
        energies, left = torch.linalg.eigh(weight @ moment @ weight.T)
        left = left.flip(1)
        return Spectrum(energies.flip(0).clamp_min(0), left, left.T @ weight)
    root, inverse_root = whitening_roots(moment)
    whitened = weight @ root
    energies, vectors = torch.linalg.eigh(whitened.T @ whitened)
    vectors = vectors.flip(1)
    return Spectrum(energies.flip(0).clamp_min(0), whitened @ vectors, vectors.T @ inverse_root)
