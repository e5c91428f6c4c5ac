"""Cutting and rounding in the basis of keys or values cost what the basis says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.compress.cache.latent_basis import (
    LatentBasis,
    _latent_bits,
    kept_bytes,
)

WIDTH = 24


def moments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A covariance, a mean and a sensitivity, all far from alike in every direction."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    spread = torch.logspace(0, -3, WIDTH, dtype=torch.float64)
    mean = 3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    return a * spread @ a.T, mean, b * spread @ b.T + 1e-3 * torch.eye(WIDTH)


@pytest.mark.parametrize("rank", [0, 1, 7, WIDTH])
def test_truncation_costs_half_the_weighted_error(rank: int) -> None:
    moment, mean, sensitivity = moments()
    basis = LatentBasis.of(moment, mean, sensitivity)
    down, up = basis.maps(rank, balanced=True)
    error = torch.eye(WIDTH, dtype=torch.float64) - up @ down
    cost = torch.trace(sensitivity @ error @ moment @ error.T) / 2
    assert float(cost) == pytest.approx(basis.truncation_losses()[rank], rel=1e-6, abs=1e-9)


def test_no_other_projection_of_that_rank_costs_less() -> None:
    moment, mean, sensitivity = moments()
    basis = LatentBasis.of(moment, mean, sensitivity)
    least = basis.truncation_losses()[8]
    generator = torch.Generator().manual_seed(1)
    down, up = basis.maps(8, balanced=False)
    for _ in range(20):
        moved = up + 0.05 * torch.randn(up.shape, generator=generator, dtype=torch.float64)
        error = torch.eye(WIDTH, dtype=torch.float64) - moved @ down
        assert float(torch.trace(sensitivity @ error @ moment @ error.T) / 2) > least


def test_without_a_sensitivity_it_is_the_whitened_svd_of_palu() -> None:
    moment, mean, _ = moments()
    basis = LatentBasis.of(moment, 0 * mean)
    root = torch.linalg.cholesky(moment)  # W S of a projection W whose outputs have this moment
    left, values, _ = torch.linalg.svd(root)
    down, up = basis.maps(5, balanced=False)
    assert torch.allclose(up @ down, left[:, :5] @ left[:, :5].T, atol=1e-8)
    assert torch.allclose(basis.energies, values**2, rtol=1e-6, atol=1e-9)


def test_the_balanced_gauge_rounds_at_the_least_cost() -> None:
    moment, mean, sensitivity = moments()
    basis = LatentBasis.of(moment, mean, sensitivity)
    rank = 16

    def cost(down: torch.Tensor, up: torch.Tensor) -> float:
        """Of the same step everywhere, in proportion to the root of the mean energy."""
        step = torch.trace(down @ moment @ down.T) / rank
        return float(torch.trace(up.T @ sensitivity @ up) * step)

    balanced = cost(*basis.maps(rank, balanced=True))
    assert balanced == pytest.approx(float(basis.energies[:rank].sqrt().sum()) ** 2 / rank)
    assert balanced < cost(*basis.maps(rank, balanced=False))


def test_a_side_that_nothing_looks_at_costs_nothing() -> None:
    moment, mean, sensitivity = moments()
    basis = LatentBasis.of(moment, mean, 0 * sensitivity)
    assert basis.truncation_losses()[0] < 1e-50


def test_moments_that_are_not_finite_are_refused() -> None:
    moment, mean, sensitivity = moments()
    for broken in ((moment * np.nan, mean, sensitivity), (moment, mean, sensitivity * np.inf)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            LatentBasis.of(*broken)


def test_bytes_count_scales_and_whole_bytes() -> None:
    assert _latent_bits(96, None) == 1536
    assert _latent_bits(96, 4) == 96 * 4 + 32
    assert kept_bytes(5, 3, 2) == 2 * 6  # 15 + 32 bits are 6 bytes
    assert kept_bytes(0, 4, 3) == 0
