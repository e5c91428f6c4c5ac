"""Rotations are orthogonal, flat where a Hadamard matrix is built, and the same for a seed."""

from __future__ import annotations

import pytest
import torch

from pipeline.quantize.rotations import flat_rotation, multiply_rows_, random_rotation


@pytest.mark.parametrize("draw", [random_rotation, flat_rotation])
def test_a_rotation_is_orthogonal_and_the_same_for_a_seed(draw) -> None:  # type: ignore[no-untyped-def]
    turn = draw(9, 4)
    assert torch.allclose(turn @ turn.T, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turn, draw(9, 4))
    assert not torch.equal(turn, draw(9, 5))
    with pytest.raises(ValueError, match="size 0"):
        draw(0, 0)


# Widths of decoders: a power of two, and those of SmolLM2, Qwen2 and Qwen2.5.
@pytest.mark.parametrize("size", [1, 2, 4, 12, 24, 64, 576, 896, 960, 1536])
def test_a_hadamard_matrix_has_entries_of_one_size(size: int) -> None:
    turn = flat_rotation(size, 0)
    torch.testing.assert_close(turn.abs(), torch.full_like(turn, size**-0.5))
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(turn @ turn.T, identity, atol=1e-12, rtol=0)


def test_sizes_without_a_hadamard_matrix_are_turned_at_random() -> None:
    assert torch.equal(flat_rotation(6, 3), random_rotation(6, 3))


def test_an_outlier_is_spread_over_all_channels() -> None:
    outlier = torch.zeros(64, dtype=torch.float64)
    outlier[5] = 8
    torch.testing.assert_close((flat_rotation(64, 1) @ outlier).abs(), torch.ones_like(outlier))


def test_views_are_multiplied_in_place_from_either_side() -> None:
    matrix, turn = torch.randn(5000, 4), random_rotation(4, 0)
    turned, other = matrix.clone(), matrix.clone().T
    multiply_rows_(turned, turn)
    multiply_rows_(other.T, turn)
    torch.testing.assert_close(turned, (matrix.double() @ turn).float())
    torch.testing.assert_close(other, turned.T)
