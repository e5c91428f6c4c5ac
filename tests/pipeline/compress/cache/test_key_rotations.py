"""What is expected of keys after they were turned is the mean over all positions."""

from __future__ import annotations

import pytest
import torch

from pipeline.compress.cache.key_rotations import KeyRotations, _spread, key_rotations
from pipeline.compress.cache.statistics import CacheStatistics
from pipeline.model.cache_structure import cache_structure
from pipeline.model.structure import decoder_structure
from tests.support.families import tiny_model

WIDTH, LENGTH = 16, 300


def angles(turned: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of halves, for the first numbers of a key."""
    speeds = 100.0 ** -(torch.arange(turned // 2) / (turned // 2))
    table = torch.outer(torch.arange(LENGTH), speeds).repeat(1, 2)[None]
    return scale * table.cos(), scale * table.sin()


def turned_by(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers turns halves of a part of every key."""
    part, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    first, second = part.chunk(2, dim=-1)
    other = torch.cat([-second, first], dim=-1)
    return torch.cat([part * cos[:, None] + other * sin[:, None], rest], dim=-1)


@pytest.mark.parametrize(("part", "scale"), [(WIDTH, 1.0), (WIDTH, 1.3), (8, 1.0)])
def test_moments_are_the_mean_over_positions(part: int, scale: float) -> None:
    cos, sin = angles(part, scale)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64) + 0.5
    gradients = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    moment, mean = keys.T @ keys / len(keys), keys.mean(0)
    moment = moment - mean.outer(mean)
    second = gradients.T @ gradients / len(gradients)
    before = CacheStatistics(moment, moment, mean, second, mean)
    found = KeyRotations.of(turned_by, (cos, sin), WIDTH).of_statistics(before)

    everywhere = keys[:, None, None].expand(-1, 1, LENGTH, -1)
    after = turned_by(everywhere, cos.double(), sin.double()).flatten(0, 2)
    assert torch.allclose(found.mean, after.mean(0), atol=1e-8)
    expected = after.T @ after / len(after) - after.mean(0).outer(after.mean(0))
    assert torch.allclose(found.moment, expected, atol=1e-6)
    # A query's product with a turned key moves by g . R k for every change of k by g.
    units = torch.eye(WIDTH, dtype=torch.float64)[:, None, None].expand(-1, 1, LENGTH, -1)
    matrices = turned_by(units, cos.double(), sin.double())[:, 0].permute(1, 2, 0)  # R_p
    back = torch.linalg.inv(matrices).transpose(1, 2)
    wanted = (back @ before.sensitivity @ back.transpose(1, 2)).mean(0)
    assert torch.allclose(found.sensitivity, wanted, atol=1e-6)


def test_numbers_that_are_not_turned_in_pairs_are_refused() -> None:
    def mixed(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return keys @ torch.ones(WIDTH, WIDTH, dtype=keys.dtype)

    with pytest.raises(ValueError, match="in pairs"):
        KeyRotations.of(mixed, angles(WIDTH), WIDTH)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_models_own_angles_are_seen_at_every_position(family: str) -> None:
    model = tiny_model(family)
    structure = cache_structure(model, decoder_structure(model))
    found = key_rotations(model, structure, 10**6)
    assert set(found) == {side.source for side in structure if side.side == "key"}
    for own in found.values():
        assert own.cos.shape == (model.config.max_position_embeddings, WIDTH // 2)
        assert torch.allclose(own.cos.square() + own.sin.square(), torch.ones(()).double())


def test_positions_of_a_long_cache_are_spread_over_all_of_it() -> None:
    places = _spread(40_000)
    assert len(places) == 2048
    assert (places.diff() >= 0).all()
    assert places[0] < 20 <= 39_980 < places[-1] < 40_000
