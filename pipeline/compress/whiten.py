"""Roots of a second moment by its eigenvalues: no Cholesky, so a singular one is no failure."""

from __future__ import annotations

import torch

RELATIVE_FLOOR = 1e-9


def whitening_roots(
    moment: torch.Tensor, relative_floor: float = RELATIVE_FLOOR
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric root R and its inverse, with S = R R and eigenvalues floored.

    Directions that the calibration text never excites would have eigenvalue zero, and no inverse;
    they are given `relative_floor` times the largest eigenvalue, so W R R^-1 = W holds exactly.

    Args:
        moment: S = E[x x^T], float64 [n, n], symmetric.
        relative_floor: smallest eigenvalue allowed, as a fraction of the largest.

    Returns:
        R and R^-1, float64 [n, n].

    Raises:
        ValueError: the moment is not finite, or is zero.
    """
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment holds NaN or infinite values")
    eigenvalues, vectors = torch.linalg.eigh(moment)
    largest = eigenvalues[-1].item()
    if largest <= 0:
        raise ValueError("the second moment is zero: the calibration text never reaches this layer")
    roots = eigenvalues.clamp_min(relative_floor * largest).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def shrunk(moment: torch.Tensor, share: float) -> torch.Tensor:
    """A second moment moved towards a multiple of the identity that has its trace.

    Few tokens estimate a wide moment badly: its large eigenvalues come out too large and its small
    ones too small. (1 - share) S + share tr(S)/n I takes part of that back (Ledoit and Wolf, 2004).

    Args:
        moment: S, float [n, n].
        share: in [0, 1].

    Returns:
        float64 [n, n].
    """
    result = moment.double() * (1 - share)
    result.diagonal().add_(share * moment.diagonal().double().mean())
    return result


def cholesky(moment: torch.Tensor, relative_ridge: float = RELATIVE_FLOOR) -> torch.Tensor:
    """Lower-triangular C with C C^T = S, up to a ridge that lets a singular S through.

    Args:
        moment: S, float64 [n, n], symmetric, positive semidefinite up to rounding.
        relative_ridge: added to the diagonal, as a fraction of the trace; raised tenfold until the
            factorisation exists.

    Raises:
        ValueError: the moment is not finite, or is zero.
    """
    trace = float(moment.diagonal().sum())
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment holds NaN or infinite values")
    if trace <= 0:
        raise ValueError("the second moment is zero: the calibration text never reaches this layer")
    identity = torch.eye(len(moment), dtype=torch.float64)
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + relative_ridge * trace * identity)
        if not failed:
            return root
        relative_ridge *= 10
