"""What the kernels are given of every format that a search may choose is the matrix itself."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.export.contract import LINEAR_QUANTIZED, QUANTIZED_OPS, block_skip_op, form_of
from pipeline.quantize.formats import (
    KERNEL_BLOCK_UNIT,
    RUNTIMES,
    Format,
    _in_kernels,
    held_by_kernels,
)
from pipeline.quantize.groupwise import quantize_blocks
from pipeline.quantize.kernel_codes import kernel_bits, kernel_block, kernel_codes, kernel_rests

EVERY = sorted({f.name for r in RUNTIMES.values() for f in (*r.formats, *r.table)})
ROWS, COLUMNS = 7, 200


def numbers_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes [n, m] out of bytes, two to a byte where they have 4 bits."""
    if bits == 8:
        return codes[:, :ROWS]
    halves = np.stack([codes.view(np.uint8) & 15, codes.view(np.uint8) >> 4], axis=-1)
    return ((halves.reshape(len(codes), -1)[:, :ROWS] ^ 8).astype(np.int8) - 8).astype(np.int8)


@pytest.mark.parametrize("name", EVERY)
def test_codes_scales_and_rests_are_the_matrix(name: str) -> None:
    format_ = Format.parse(name)
    assert held_by_kernels(format_)
    weight = np.random.default_rng(3).normal(size=(ROWS, COLUMNS)) + 0.3
    width = format_.width(COLUMNS)
    held = quantize_blocks(weight.astype(np.float32), format_.bits, width, zero=format_.zero)
    block = kernel_block(format_, COLUMNS)
    assert block % KERNEL_BLOCK_UNIT == 0
    codes = numbers_of(kernel_codes(held), kernel_bits(format_.bits))
    scales, rests = held.scales.T, kernel_rests(held)
    assert (rests is None) == format_.symmetric
    wide = codes * scales.repeat(block, 0)[:COLUMNS]
    if rests is not None:
        wide = wide + rests.repeat(block, 0)[:COLUMNS]
    expected = held.dequantized().T
    np.testing.assert_allclose(wide, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_a_search_for_tensorrt_may_choose_has_a_kernel_and_an_op() -> None:
    runtime = RUNTIMES["tensorrt"]
    for a in (*runtime.formats, *runtime.table):
        assert _in_kernels(a)
        assert runtime.accepts(a)
        assert kernel_bits(a.bits) == a.bits
        assert LINEAR_QUANTIZED + form_of(a.bits) in QUANTIZED_OPS
        for b in runtime.formats:
            assert block_skip_op(form_of(a.bits), form_of(b.bits), True) in QUANTIZED_OPS


def test_of_other_runtimes_tensorrt_takes_what_has_no_zero_points() -> None:
    taken = {name for name in EVERY if _in_kernels(Format.parse(name))}
    assert taken >= {"int8-b128-sym", "int8-b32-sym", "int4-b64-sym"}
    assert not [name for name in taken if not name.endswith("sym")]
    assert not [name for name in EVERY if name.endswith("-asym") and name in taken]
