"""Finding out whether a matrix has been in few bits before."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.blocks import dequantize_blocks, quantize_blocks
from pipeline.quantize.formats import parse_format
from pipeline.quantize.lossless import is_kept_by

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(24, 96)).astype(np.float32)
STYLE = parse_format("int4-b32-offset")


def in_format(name: str) -> np.ndarray:
    style = parse_format(name)
    return dequantize_blocks(quantize_blocks(WEIGHT, style.bits, style.block, zero=style.zero))


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
    assert not is_kept_by(STYLE, WEIGHT)


def test_one_weight_off_the_grid_is_enough() -> None:
    weight = in_format("int4-b32-offset").copy()
    step = quantize_blocks(weight, 4, 32, zero="offset").scales[5, 0]
    place = int(np.argsort(weight[5, :32])[16])  # neither least nor greatest of its block
    weight[5, place] += 0.4 * step
    assert not is_kept_by(STYLE, weight)


def test_zeros_are_kept() -> None:
    assert is_kept_by(STYLE, np.zeros((3, 64), np.float32))
