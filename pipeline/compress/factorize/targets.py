"""Targets for a layer that no longer sees what it saw in the original model.

With x the input in the original model, x' that in the compressed one, and the wanted output
y* = (1 - mix) W x' + mix W x, the least-squares fit to y* on x' is

    W* = W (I + mix D S'^-1),  S' = E[x' x'^T],  D = E[(x - x') x'^T],

and the best rank-r fit is W* cut at rank r in the geometry of S' (reduced-rank regression). mix = 0
keeps the layer's own weights; mix = 1 asks it to undo all of the error that reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.compress.factorize.whitened_svd import InputMoments, whitened_spectrum

_RELATIVE_RIDGE = 1e-3


def propagated_target(
    weight: torch.Tensor,
    seen: torch.Tensor,
    drift: torch.Tensor,
    mix: float,
    relative_ridge: float = _RELATIVE_RIDGE,
) -> torch.Tensor:
    """The dense weight that fits the wanted output best, W*.

    Args:
        weight: W, float [m, n].
        seen: S' = E[x' x'^T], float64 [n, n].
        drift: D = E[(x - x') x'^T], float64 [n, n].
        mix: share of the original model's output in the target, in [0, 1].
        relative_ridge: added to S', as a fraction of the mean of S''s diagonal; it pulls
            directions in which x' hardly moves towards W itself.

    Returns:
        float64 [m, n].

    Raises:
        ValueError: moments that are not finite.
    """
    if not (torch.isfinite(seen).all() and torch.isfinite(drift).all()):
        raise ValueError("the second moment holds NaN or infinite values")
    weight = weight.double()
    if mix == 0:
        return weight
    ridge = relative_ridge * seen.diagonal().mean()
    regular = seen.clone()
    regular.diagonal().add_(ridge)
    return weight + mix * torch.linalg.solve(regular, drift.T @ weight.T).T


def _reconstructed_factors(
    left: torch.Tensor, right: torch.Tensor, target: torch.Tensor, moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One closed-form update of each factor in turn, as MPIFA's reconstruction does.

    U = W* S V^T (V S V^T)^-1, the least-squares fit with V held; then V = U^+ W*, which is the
    least-squares fit of the weights, not of the outputs (Zhao et al., ICML 2025).

    Args:
        left: U at the start, float64 [m, r]; only its shape matters.
        right: V at the start, float64 [r, n].
        target: W*, float64 [m, n].
        moment: S, float64 [n, n].
    """
    latent = right @ moment @ right.T
    left = torch.linalg.lstsq(latent, right @ moment @ target.T, driver="gelsd").solution.T
    return left, torch.linalg.lstsq(left, target, driver="gelsd").solution


def reconstructed(
    stack: torch.Tensor,
    target: torch.Tensor,
    rank: int,
    inputs: InputMoments,
    geometry: torch.Tensor,
    sensitivities: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """B [m, r] and A [r, n] of the matrix as it is, cut, and then fitted to the target in turn.

    Arguments as in `pipeline.compress.factorize.whitened_svd.truncated`.
    """
    left, right = whitened_spectrum(stack, geometry, sensitivities, inputs.roots).factors(rank)
    return _reconstructed_factors(left, right, target, inputs.seen)
