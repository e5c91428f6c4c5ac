"""Rounding in blocks: the grid is right, and searching its range never loses."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.formats import _ZEROS, Format, Zero
from pipeline.quantize.groupwise import _SHRINKAGES, is_kept_by, pad_to_blocks, quantize_blocks

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(5, 70)).astype(np.float32)


@pytest.mark.parametrize("zero", _ZEROS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_clipping_no_weight_is_further_than_half_a_step_from_its_code(
    bits: int, zero: Zero, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.quantize.groupwise._SHRINKAGES", np.ones(1, np.float32))
    blocks = quantize_blocks(WEIGHT, bits, 32, zero=zero)
    error = np.abs(pad_to_blocks(blocks.dequantized() - WEIGHT, 32))
    # A zero point between two codes shifts the range by up to half a step; scales and offsets are
    # numbers of float16.
    allowed = blocks.scales[..., None] * {"sym": 0.5, "asym": 1.0, "offset": 0.5}[zero]
    coarse = 0 if zero != "offset" else 2.0**-11 * np.abs(pad_to_blocks(WEIGHT, 32)).max()
    assert (error <= (allowed + 2 * coarse) * (1 + 1e-5)).all()


@pytest.mark.parametrize("zero", _ZEROS)
def test_searching_the_range_never_adds_error(zero: Zero, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = quantize_blocks(WEIGHT, 4, 32, zero=zero).dequantized()
    monkeypatch.setattr("pipeline.quantize.groupwise._SHRINKAGES", _SHRINKAGES[:1])
    plain = quantize_blocks(WEIGHT, 4, 32, zero=zero).dequantized()
    errors = [np.square(pad_to_blocks(w - WEIGHT, 32)).sum(axis=-1) for w in (searched, plain)]
    assert (errors[0] <= errors[1] + 1e-6).all()
    assert errors[0].sum() < errors[1].sum()


def test_weights_on_the_grid_are_exact() -> None:
    codes = RANDOM.integers(0, 16, size=(3, 2, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    grid = ((codes - 7) * 0.25).reshape(3, 64).astype(np.float32)
    blocks = quantize_blocks(grid, 4, 32, zero="asym")
    np.testing.assert_array_equal(blocks.dequantized(), grid)
    assert blocks.zero_points is not None
    assert (blocks.zero_points == 7).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("steps", ["all", "fewer"])
def test_weights_on_a_grid_that_begins_anywhere_are_exact_with_offsets(
    bits: int, steps: str
) -> None:
    largest = 2**bits - 1 if steps == "all" else 2**bits - 2
    codes = RANDOM.integers(0, largest + 1, size=(6, 4, 32))
    codes[..., 0], codes[..., 1] = 0, largest
    scales = (RANDOM.uniform(0.01, 0.02, size=(6, 4, 1)).astype(np.float16)).astype(np.float32)
    least = RANDOM.normal(size=(6, 4, 1)).astype(np.float16).astype(np.float32)
    weight = (codes * scales + least).reshape(6, 128).astype(np.float32)
    blocks = quantize_blocks(weight, bits, 32, zero="offset")
    np.testing.assert_array_equal(blocks.codes, codes)
    np.testing.assert_array_equal(blocks.offsets, least[..., 0])
    np.testing.assert_allclose(blocks.dequantized(), weight, rtol=0, atol=1e-6)


def test_offsets_lose_no_more_than_zero_points_that_are_codes() -> None:
    asym, offset = (
        np.square(quantize_blocks(WEIGHT, 4, 32, zero=zero).dequantized() - WEIGHT).sum()
        for zero in ("asym", "offset")
    )
    assert offset < asym


@pytest.mark.parametrize("zero", _ZEROS)
def test_zeros_stay_zeros(zero: Zero) -> None:
    blocks = quantize_blocks(np.zeros((2, 40), np.float32), 4, 32, zero=zero)
    assert not blocks.dequantized().any()


@pytest.mark.parametrize("bits", [1, 9])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8"):
        quantize_blocks(WEIGHT, bits, 32, zero="sym")


def test_important_columns_decide_the_range() -> None:
    weight = RANDOM.normal(size=(20, 32)).astype(np.float32)
    weight[:, 0] = 8.0
    plain, weighted = (
        quantize_blocks(weight, 3, 32, zero="sym", importance=importance).dequantized()
        for importance in (None, np.r_[1e-6, np.ones(31)])
    )
    errors = [np.square(w - weight)[:, 1:].sum() for w in (plain, weighted)]
    assert errors[1] < errors[0]


def test_scales_are_numbers_of_float16() -> None:
    scales = quantize_blocks(WEIGHT * 1e-4, 4, 32, zero="asym").scales
    np.testing.assert_array_equal(scales, scales.astype(np.float16).astype(np.float32))


def test_offsets_are_numbers_of_float16_and_come_back_from_the_zero_points() -> None:
    blocks = quantize_blocks(WEIGHT, 4, 32, zero="offset")
    assert blocks.has_offsets
    assert blocks.zero_points is not None
    np.testing.assert_array_equal(
        blocks.offsets, blocks.offsets.astype(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(-blocks.offsets / blocks.scales, blocks.zero_points)


LOSSLESS_RANDOM = np.random.default_rng(0)
LOSSLESS_WEIGHT = LOSSLESS_RANDOM.normal(size=(24, 96)).astype(np.float32)
STYLE = Format.parse("int4-b32-offset")


def in_format(name: str) -> np.ndarray:
    style = Format.parse(name)
    return quantize_blocks(LOSSLESS_WEIGHT, style.bits, style.block, zero=style.zero).dequantized()


@pytest.mark.parametrize(
    "name", ["int4-b32-offset", "int4-b32-asym", "int4-b32-sym", "int4-b64-sym", "int2-b32-offset"]
)
def test_what_was_in_4_bits_or_fewer_is_kept_by_4_bits_with_offsets(name: str) -> None:
    assert is_kept_by(STYLE, in_format(name))


@pytest.mark.parametrize("dtype", [np.float16])
def test_it_is_kept_when_it_was_stored_in_half_precision(dtype: type) -> None:
    assert is_kept_by(STYLE, in_format("int4-b32-offset").astype(dtype).astype(np.float32))


@pytest.mark.parametrize("name", ["int6-b32-sym", "int8-b32-sym", "int4-b16-offset"])
def test_finer_grids_are_not_kept(name: str) -> None:
    assert not is_kept_by(STYLE, in_format(name))


def test_any_weights_are_not_kept() -> None:
    assert not is_kept_by(STYLE, LOSSLESS_WEIGHT)


def test_one_weight_off_the_grid_is_enough() -> None:
    weight = in_format("int4-b32-offset").copy()
    step = quantize_blocks(weight, 4, 32, zero="offset").scales[5, 0]
    place = int(np.argsort(weight[5, :32])[16])  # neither least nor greatest of its block
    weight[5, place] += 0.4 * step
    assert not is_kept_by(STYLE, weight)


def test_zeros_are_kept() -> None:
    assert is_kept_by(STYLE, np.zeros((3, 64), np.float32))
