"""Whitened truncation: the rank-r matrix that loses least, one-sided or two-sided.

One-sided: min over rank r of E |W x - W_r x|^2 = min |(W - W_r) R|_F^2 with S = E[x x^T] = R R, and
its value is the tail of the squared singular values of W R (Eckart-Young).

Two-sided: with g the gradient of the model's log-likelihood by y = W x and G = E[g g^T] = L^T L, an
error D y costs E (g . D y)^2 / 2 nats of KL to second order. K-FAC takes x and g as independent,
and the cost becomes tr(G (W - W_r) S (W - W_r)^T) / 2 = |L (W - W_r) R|_F^2 / 2. For a stack of
matrices G is block-diagonal, so that each has its own importance.

Two equal ways to the optimum, of which the one with the smaller eigenproblem is taken:

- m <= n: with L W S W^T L^T = U diag(s^2) U^T, W_r = (L^-1 U_r) (U_r^T L W): S is never inverted;
- m > n: with R W^T G W R = V diag(s^2) V^T, W_r = (W R V_r) (V_r^T R^-1): no root of G is needed.

Both are projections, so at full rank the product is W whatever the accuracy of U or V.

Roots of a second moment by its eigenvalues: no Cholesky, so a singular one is no failure.

The target of a layer that no longer sees what it saw in the original model: with x the input there,
x' that in the compressed one, and the wanted output y* = (1 - mix) W x' + mix W x, the
least-squares fit to y* on x' is

    W* = W (I + mix D S'^-1),  S' = E[x' x'^T],  D = E[(x - x') x'^T],

and the best rank-r fit is W* cut at rank r in the geometry of S' (reduced-rank regression). mix = 0
keeps the layer's own weights; mix = 1 asks it to undo all of the error that reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pipeline.compress.factorize.second_moments import (
    Moment,
    cholesky,
    is_finite,
    is_zero,
    row_blocks,
    times_moment,
    weighted_gram,
)
from pipeline.quantize.sensitivity import Sensitivity

_RELATIVE_FLOOR = 1e-9
# Of the widest matrices, what is held in float64 besides the sums.
_COLUMNS_AT_ONCE = 4096


def _whitening_roots(
    moment: torch.Tensor, relative_floor: float = _RELATIVE_FLOOR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric root R and its inverse of S = R R, float64 [n, n], eigenvalues floored.

    Directions that the calibration text never excites would have eigenvalue zero, and no inverse;
    they are given `relative_floor` times the largest eigenvalue, so W R R^-1 = W holds exactly.

    Raises:
        ValueError: the moment is not finite, or is zero.
    """
    if not is_finite(moment):
        raise ValueError("the second moment holds NaN or infinite values")
    eigenvalues, vectors = torch.linalg.eigh(moment)
    largest = eigenvalues[-1].item()
    if largest <= 0:
        raise ValueError("the second moment is zero: the calibration text never reaches this layer")
    roots = eigenvalues.clamp_min(relative_floor * largest).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


@dataclass(frozen=True)
class Spectrum:
    """A matrix in its whitened basis, ready to be cut at any rank up to the one it has.

    Attributes:
        energies: squared singular values of L W R in falling order, float64 [min(m, n)].
        left: B, float64 [m, k].
        right: A, float64 [k, n].
    """

    energies: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """B [m, rank] and A [rank, n] of the best rank-r product B A."""
        return self.left[:, :rank], self.right[:rank]

    def relative_tail(self, rank: int) -> float:
        """What rank r loses as a fraction of what rank 0 loses, in [0, 1]."""
        total = self.energies.sum()
        return float(self.energies[rank:].sum() / total) if total > 0 else 0.0

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        moment: Moment,
        sensitivities: Sequence[Sensitivity] = (),
        roots: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = _whitening_roots,
        rank: int | None = None,
    ) -> Spectrum:
        """A weight decomposed in the geometry of its inputs and, if given, of the loss.

        Args:
            weight: W, float [m, n]; perhaps a stack of matrices.
            moment: S = E[x x^T], float [n, n].
            sensitivities: G = E[g g^T] of each matrix of the stack, float64 [m_i, m_i], of full
                rank (see `shrunk`); none for the one-sided truncation.
            roots: gives R and R^-1 of the moment, where they are needed.
            rank: k; None for all of them.

        Raises:
            ValueError: shapes that do not fit, or a moment that is not finite or zero.
        """
        rows, columns = weight.shape
        _require_fit(weight, moment, sensitivities)
        if rows <= columns:
            uppers = [cholesky(block.double()).T for block in sensitivities]
            inner = _weighted(weight, uppers)
            energies, vectors = _falling_eigen(_quadratic(inner, moment))
            vectors = vectors[:, :rank]
            return cls(energies, _unweighted(vectors, uppers), vectors.T @ inner)
        root, inverse_root = roots(moment.double())
        energies, vectors = _falling_eigen(root @ weighted_gram(weight, sensitivities) @ root)
        vectors = vectors[:, :rank]
        return cls(energies, _product(weight, root @ vectors), vectors.T @ inverse_root)


def _tails_of(energies: torch.Tensor) -> torch.Tensor:
    """Sums of what is left of falling energies [k] behind each rank, float64 [k + 1]."""
    return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])


@dataclass
class InputMoments:
    """Second moments of what the linears of one group read, however they are stacked.

    Attributes:
        seen: of the input the factors will be given, float [n, n].
        drift: E[(x - x') x'^T], x' that input and x the original model's, float [n, n]; None when
            they are the same.
    """

    seen: torch.Tensor
    drift: torch.Tensor | None = None
    _roots: tuple[torch.Tensor, torch.Tensor] | None = None

    def roots(self, geometry: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """R and R^-1 of the geometry, which is one and the same for every stack of the group."""
        if self._roots is None:
            self._roots = _whitening_roots(geometry)
        return self._roots

    def target(self, stack: torch.Tensor, mix: float) -> torch.Tensor:
        """What a stack should be, given what it will be fed.

        Args:
            stack: W, float [m, n].
            mix: share of the original model's output in the target, in [0, 1].

        Returns:
            float [m, n]: the stack itself where nothing has drifted, else float64.
        """
        if self.drift is None:
            return stack
        return _propagated_target(stack, self.seen, self.drift, mix)


def truncated(
    stack: torch.Tensor,
    target: torch.Tensor,
    rank: int,
    inputs: InputMoments,
    geometry: Moment,
    sensitivities: Sequence[Sensitivity],
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [m, r] and A [r, n] of the product that is nearest to the target.

    Args:
        stack: W, float [m, n]; not looked at.
        target: W*, float [m, n].
        rank: r.
        inputs: of the stack.
        geometry: S, float [n, n].
        sensitivities: as in `Spectrum.of`.
    """
    return Spectrum.of(target, geometry, sensitivities, inputs.roots, rank).factors(rank)


def truncation_losses(
    weight: torch.Tensor, moment: Moment, sensitivities: Sequence[Sensitivity] = ()
) -> torch.Tensor:
    """What is lost at each rank: tr(G (W - W_r) S (W - W_r)^T), float64 [min(m, n) + 1]."""
    if isinstance(moment, torch.Tensor) and is_zero(moment):
        return torch.zeros(min(weight.shape) + 1, dtype=torch.float64)
    return _tails_of(_whitened_energies(weight, moment, sensitivities))


def _whitened_energies(
    weight: torch.Tensor, moment: Moment, sensitivities: Sequence[Sensitivity] = ()
) -> torch.Tensor:
    """The energies of `Spectrum.of` alone, at a fraction of its cost: no vectors, no root.

    They are the eigenvalues of L W S W^T L^T, or equally of C^T W^T G W C with S = C C^T.
    """
    rows, columns = weight.shape
    _require_fit(weight, moment, sensitivities)
    if rows <= columns:
        inner = _weighted(weight, [cholesky(block.double()).T for block in sensitivities])
        product = _quadratic(inner, moment)
    else:
        root = cholesky(moment.double())
        product = root.T @ weighted_gram(weight, sensitivities) @ root
    return torch.linalg.eigvalsh((product + product.T) / 2).flip(0).clamp_min(0)


def _quadratic(matrix: torch.Tensor, moment: Moment) -> torch.Tensor:
    """M S M^T, float64 [m, m], by a block of rows of M at a time, and for each one of S."""
    found = torch.empty(len(matrix), len(matrix), dtype=torch.float64)
    for rows in row_blocks(len(matrix)):
        torch.matmul(times_moment(matrix[rows], moment), matrix.T, out=found[rows])
    return found


def _product(weight: torch.Tensor, map: torch.Tensor) -> torch.Tensor:
    """W M, float64 [m, k], by a block of rows of W at a time."""
    found = torch.empty(len(weight), map.shape[1], dtype=torch.float64)
    for rows in row_blocks(len(weight)):
        torch.matmul(weight[rows].double(), map, out=found[rows])
    return found


def _weighted(weight: torch.Tensor, roots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each matrix of a stack multiplied from the left by its own, float64; itself for none."""
    if not roots:
        return weight.double()
    found = torch.empty(weight.shape, dtype=torch.float64)
    start = 0
    for root in roots:
        rows = slice(start, start + len(root))
        for first in range(0, weight.shape[1], _COLUMNS_AT_ONCE):
            columns = slice(first, first + _COLUMNS_AT_ONCE)
            found[rows, columns] = root @ weight[rows, columns].double()
        start = rows.stop
    return found


def _unweighted(stack: torch.Tensor, roots: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inverse of `_weighted`, for upper-triangular roots."""
    if not roots:
        return stack
    parts = stack.split([len(root) for root in roots])
    solved = [
        torch.linalg.solve_triangular(root, part, upper=True)
        for root, part in zip(roots, parts, strict=True)
    ]
    return torch.cat(solved)


def _falling_eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, not below zero, in falling order, and their vectors as columns."""
    # What was given is let go, since nobody else holds it.
    matrix = (matrix + matrix.T).div_(2)
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return eigenvalues.flip(0).clamp_min(0), vectors.flip(1)


def _require_fit(
    weight: torch.Tensor, moment: Moment, sensitivities: Sequence[Sensitivity]
) -> None:
    rows, columns = weight.shape
    if len(moment) != columns:
        raise ValueError(f"a moment of {len(moment)} rows does not fit weight {(rows, columns)}")
    if sensitivities and sum(len(block) for block in sensitivities) != rows:
        heights = [len(block) for block in sensitivities]
        raise ValueError(f"sensitivities of {heights} rows do not fit weight {(rows, columns)}")
    if not all(is_finite(moment[rows]) for rows in row_blocks(columns)):
        raise ValueError("the second moment holds NaN or infinite values")
    for block in sensitivities:
        if not all(is_finite(block[rows]) for rows in row_blocks(len(block))):
            raise ValueError("the sensitivity holds NaN or infinite values")


_RELATIVE_RIDGE = 1e-3


def _propagated_target(
    weight: torch.Tensor,
    seen: torch.Tensor,
    drift: torch.Tensor,
    mix: float,
    relative_ridge: float = _RELATIVE_RIDGE,
) -> torch.Tensor:
    """The dense weight that fits the wanted output best, W*, float64 [m, n].

    A ridge, relative to the mean of the diagonal of S', pulls directions in which x' hardly moves
    towards W itself.

    Raises:
        ValueError: moments that are not finite.
    """
    if not (is_finite(seen) and is_finite(drift)):
        raise ValueError("the second moment holds NaN or infinite values")
    if mix == 0:
        return weight.double()
    root = cholesky(seen, relative_ridge / len(seen))
    found = weight.to(torch.float64, copy=True)
    for rows in row_blocks(len(weight)):
        moved = times_moment(found[rows], drift)
        found[rows] += mix * torch.cholesky_solve(moved.T, root).T
    return found


def _reconstructed_factors(
    left: torch.Tensor, right: torch.Tensor, target: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One closed-form update of each factor in turn, as MPIFA's reconstruction does.

    U = W* S V^T (V S V^T)^-1, the least-squares fit with V held; then V = U^+ W*, which is the
    least-squares fit of the weights, not of the outputs (Zhao et al., ICML 2025).
    """
    latent = right @ moment @ right.T
    left = torch.linalg.lstsq(latent, right @ moment @ target.T, driver="gelsd").solution.T
    return left, torch.linalg.lstsq(left, target, driver="gelsd").solution


def reconstructed(
    stack: torch.Tensor,
    target: torch.Tensor,
    rank: int,
    inputs: InputMoments,
    geometry: Moment,
    sensitivities: Sequence[Sensitivity],
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [m, r] and A [r, n] of the matrix as it is, cut, and then fitted to the target in turn.

    Arguments as in `truncated`.
    """
    spectrum = Spectrum.of(stack, geometry, sensitivities, inputs.roots, rank)
    return _reconstructed_factors(*spectrum.factors(rank), target.double(), inputs.seen.double())
