from __future__ import annotations

import torch

from pipeline.quantize.cache_rounding import CacheRounding

RANGES = [(torch.tensor([[1.0, 4.0], [0.5, 0.0]]), torch.tensor([[2.0, 1.0], [3.0, 8.0]]))]


def test_what_is_within_the_ranges_is_off_by_half_a_step_at_most() -> None:
    rounding = CacheRounding.reaching(RANGES)
    states = [(2 * torch.rand(3, 2, 5, 2) - 1) * side[:, None, :] for side in RANGES[0]]
    for found, given, scales in zip(
        rounding.rounded(0, *states), states, rounding.scales[0], strict=True
    ):
        assert bool(((found - given).abs() <= 0.501 * scales[:, None, :]).all())


def test_rounding_what_is_rounded_changes_no_bit() -> None:
    rounding = CacheRounding.reaching(RANGES, 0.7, 1.2)
    once = rounding.rounded(0, torch.randn(1, 2, 9, 2), torch.randn(1, 2, 9, 2))
    for again, before in zip(rounding.rounded(0, *once), once, strict=True):
        assert torch.equal(again, before)


def test_what_is_beyond_is_cut_off_at_the_last_code() -> None:
    (keys, _) = CacheRounding.reaching(RANGES).rounded(
        0, torch.full((1, 2, 1, 2), 100.0), torch.zeros(1, 2, 1, 2)
    )
    torch.testing.assert_close(keys[0, 0, 0], torch.tensor([1.0, 4.0]))


def test_a_widened_head_has_scales_for_the_zeros_beside() -> None:
    rounding = CacheRounding.reaching(RANGES)
    keys, _ = rounding.widened(0, 4)
    assert keys.shape == (8,)
    assert keys.reshape(2, 4)[:, 2:].tolist() == [[1.0, 1.0]] * 2
    assert torch.equal(keys.reshape(2, 4)[:, :2], rounding.scales[0][0])
    assert rounding.sha256() != CacheRounding.reaching(RANGES, 0.9).sha256()
