"""Block skipping: spend the r x r freedom of a product B A on an identity block.

With A P = [A1 A2], A' = A1^-1 A2 and B' = B A1: B A x = B' (x1 + A' x2) exactly, [x1; x2] = P^T x.
It stores r (m + n - r) numbers instead of r (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.compress.pivot import BOUND, strong_pivots


@dataclass(frozen=True)
class SkipFactors:
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


def skip_block(b: torch.Tensor, a: torch.Tensor, bound: float = BOUND) -> SkipFactors:
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
    permutation, interpolation = strong_pivots(a, bound)
    up = b.double() @ a.double()[:, permutation[: a.shape[0]]]
    return SkipFactors(permutation, interpolation, up)
