"""Packing codes is reversible, and lies where ONNX expects it."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.groupwise import _unpack_codes, pack_codes

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 13, 32])
def test_packed_codes_can_be_read_back_from_as_few_bytes_as_hold_them(
    bits: int, count: int
) -> None:
    codes = RANDOM.integers(0, 2**bits, size=(3, 2, count), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 2, -(-count * bits // 8))
    np.testing.assert_array_equal(_unpack_codes(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_code_is_in_the_lowest_bits(bits: int) -> None:
    codes = np.arange(8 // bits, dtype=np.uint8)[None]
    expected = sum(int(code) << (i * bits) for i, code in enumerate(codes[0]))
    assert pack_codes(codes, bits).tolist() == [[expected]]


@pytest.mark.parametrize("bits", [0, 9])
def test_codes_that_do_not_fit_a_byte_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack_codes(np.zeros((1, 8), np.uint8), bits)
