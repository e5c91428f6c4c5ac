"""Rounding in blocks: the grid is right, and searching its range never loses."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.blocks import (
    SHRINKAGES,
    dequantize_blocks,
    pad_to_blocks,
    quantize_blocks,
)

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(5, 70)).astype(np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_clipping_no_weight_is_further_than_half_a_step_from_its_code(
    bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.quantize.blocks.SHRINKAGES", np.ones(1, np.float32))
    blocks = quantize_blocks(WEIGHT, bits, 32, symmetric=symmetric)
    error = np.abs(pad_to_blocks(dequantize_blocks(blocks) - WEIGHT, 32))
    # A zero point between two codes shifts the range by up to half a step.
    allowed = blocks.scales[..., None] * (0.5 if symmetric else 1.0)
    assert (error <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_the_range_never_adds_error(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = dequantize_blocks(quantize_blocks(WEIGHT, 4, 32, symmetric=symmetric))
    monkeypatch.setattr("pipeline.quantize.blocks.SHRINKAGES", SHRINKAGES[:1])
    plain = dequantize_blocks(quantize_blocks(WEIGHT, 4, 32, symmetric=symmetric))
    errors = [np.square(pad_to_blocks(w - WEIGHT, 32)).sum(axis=-1) for w in (searched, plain)]
    assert (errors[0] <= errors[1] + 1e-6).all()
    assert errors[0].sum() < errors[1].sum()


def test_weights_on_the_grid_are_exact() -> None:
    codes = RANDOM.integers(0, 16, size=(3, 2, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    grid = ((codes - 7) * 0.25).reshape(3, 64).astype(np.float32)
    blocks = quantize_blocks(grid, 4, 32, symmetric=False)
    np.testing.assert_array_equal(dequantize_blocks(blocks), grid)
    assert blocks.zero_points is not None
    assert (blocks.zero_points == 7).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    blocks = quantize_blocks(np.zeros((2, 40), np.float32), 4, 32, symmetric=symmetric)
    assert not dequantize_blocks(blocks).any()


@pytest.mark.parametrize("bits", [1, 9])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8"):
        quantize_blocks(WEIGHT, bits, 32, symmetric=True)


def test_important_columns_decide_the_range() -> None:
    weight = RANDOM.normal(size=(20, 32)).astype(np.float32)
    weight[:, 0] = 8.0
    plain, weighted = (
        dequantize_blocks(quantize_blocks(weight, 3, 32, symmetric=True, importance=importance))
        for importance in (None, np.r_[1e-6, np.ones(31)])
    )
    errors = [np.square(w - weight)[:, 1:].sum() for w in (plain, weighted)]
    assert errors[1] < errors[0]


def test_scales_are_numbers_of_float16() -> None:
    scales = quantize_blocks(WEIGHT * 1e-4, 4, 32, symmetric=False).scales
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))
