"""Errors that are fed back cost what is expected of them, and the start of a text next to none."""

from __future__ import annotations

import pytest
import torch

from pipeline.checkpoint.modeling_latent_codes import codes_of
from pipeline.compress.cache.latent_rounding import (
    FedCoordinates,
    clip_of,
    has_start,
    rounding_losses,
)
from pipeline.quantize.rotations import random_rotation

ENERGIES = torch.logspace(0, -3, 64, dtype=torch.float64)


def drawn(energies: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4000, len(energies), generator=generator).double() * energies.sqrt()


def start_of(energies: torch.Tensor) -> torch.Tensor:
    """A first token five times as far out as others."""
    generator = torch.Generator().manual_seed(1)
    return 5 * torch.randn(len(energies), generator=generator).double() * energies.sqrt()


def cost(fed: FedCoordinates, latent: torch.Tensor, bits: int, *, feeds: bool = True) -> float:
    feedback = fed.feedback if feeds else None
    codes, step, low = codes_of(latent @ fed.into.T, bits, clip_of(len(fed.into), bits), feedback)
    return float((((codes * step + low) @ fed.back.T - latent).square().sum(-1) / 2).mean())


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 16, 33])
def test_codes_that_are_not_rounded_lose_nothing_and_alike_are_a_multiple_of_the_start(
    rank: int,
) -> None:
    start = start_of(ENERGIES[: rank - 1])
    fed = FedCoordinates.of(ENERGIES[: rank - 1], start, 0)
    assert torch.allclose(fed.back @ fed.into, torch.eye(rank - 1, dtype=torch.float64))
    alike = fed.back.sum(1)
    assert float(alike @ start / alike.norm() / start.norm()) == pytest.approx(1.0)
    assert fed.feedback.shape == (rank - rank // 2, rank // 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_rounding_costs_what_is_expected_of_normal_latents(bits: int) -> None:
    own = ENERGIES[:-1]
    expected = rounding_losses(ENERGIES, bits)[-1]
    led = cost(FedCoordinates.of(own, start_of(own), 0), drawn(own), bits)
    assert led == pytest.approx(expected, rel=0.3)
    whole = cost(FedCoordinates.of(ENERGIES, None, 0), drawn(ENERGIES), bits)
    assert whole == pytest.approx(expected, rel=0.3)


def test_the_coordinate_that_the_start_takes_is_counted_where_bits_are_few() -> None:
    assert has_start(32, 64, 3)
    for rank, bits in ((64, 3), (32, 8), (1, 3)):
        assert not has_start(rank, 64, bits)
    shorter = rounding_losses(ENERGIES[:32], 3)[32]
    assert rounding_losses(ENERGIES, 3)[32] == pytest.approx(shorter + float(ENERGIES[31]) / 2)
    assert rounding_losses(ENERGIES, 8)[32] == pytest.approx(rounding_losses(ENERGIES[:32], 8)[32])


@pytest.mark.parametrize("rank", [2, 3, 16, 33])
def test_as_many_coordinates_as_codes_lose_nothing_either(rank: int) -> None:
    fed = FedCoordinates.of(ENERGIES[:rank], None, 0)
    assert torch.allclose(fed.back @ fed.into, torch.eye(rank, dtype=torch.float64))
    assert fed.feedback.shape == (rank - rank // 2, rank // 2)


@pytest.mark.parametrize(("bits", "gain"), [(2, 2.5), (3, 1.7), (4, 1.5)])
def test_feedback_costs_less_than_the_balanced_gauge_rounded_plainly(
    bits: int, gain: float
) -> None:
    latent, scale = drawn(ENERGIES), ENERGIES**0.25
    turned = random_rotation(len(ENERGIES), 0)
    codes, step, low = codes_of(latent / scale @ turned.T, bits)
    errors = ((codes * step + low) @ turned * scale - latent).square().sum(-1) / 2
    fed = FedCoordinates.of(ENERGIES, start_of(ENERGIES), 0)
    assert cost(fed, latent, bits) < float(errors.mean()) / gain
    assert cost(fed, latent, bits) < cost(fed, latent, bits, feeds=False)


def test_the_start_itself_is_held_to_sixteen_bits() -> None:
    start = start_of(ENERGIES)
    fed = FedCoordinates.of(ENERGIES, start, 0)
    assert cost(fed, start[None], 2) < 1e-5 * cost(fed, drawn(ENERGIES), 2)


def test_a_start_that_is_nowhere_is_no_direction() -> None:
    fed = FedCoordinates.of(ENERGIES, torch.zeros(64, dtype=torch.float64), 0)
    assert torch.allclose(fed.back @ fed.into, torch.eye(64, dtype=torch.float64))


def test_fewer_bits_reach_less_of_a_range() -> None:
    assert clip_of(96, 2) < clip_of(96, 3) < clip_of(96, 5) == clip_of(96, 8) == 1.0
    assert clip_of(8, 3) == 1.0


def test_codes_reach_the_share_of_the_range_that_they_are_told() -> None:
    latent = torch.randn(5, 64)
    for clip in (1.0, 0.7):
        codes, step, _ = codes_of(latent, 4, clip)
        reach = (15 * step).squeeze(-1) / (latent.amax(-1) - latent.amin(-1))
        assert torch.allclose(reach, torch.tensor(clip), rtol=2e-3)
        assert codes.min() == 0
        assert codes.max() == 15
