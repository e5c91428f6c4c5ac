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
