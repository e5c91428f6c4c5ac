"""Formats: names, sizes as they are stored, and who takes them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.formats import _BITS, _ZEROS, RUNTIMES, Format, Zero
from pipeline.quantize.groupwise import Blocks, quantize_blocks


@pytest.mark.parametrize(
    "name", ["int4-b32-asym", "int8-row-sym", "int3-b64-sym", "int4-b32-offset"]
)
def test_a_format_is_found_by_its_name(name: str) -> None:
    assert Format.parse(name).name == name


@pytest.mark.parametrize("name", ["int4", "int5-b32-sym", "int4-b32-odd", "four-b32-sym", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"int4-b32-asym|one of"):
        Format.parse(name)


@pytest.mark.parametrize("bits", _BITS)
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("zero", _ZEROS)
def test_stored_bytes_are_those_of_the_stored_tensors_and_nothing_is_lost_in_them(
    bits: int, block: int, zero: Zero
) -> None:
    style = Format(bits, block, zero)
    weight = np.random.default_rng(0).normal(size=(5, 72)).astype(np.float32)
    blocks = quantize_blocks(weight, bits, style.width(72), zero=zero)
    tensors = blocks.stored_tensors()
    assert style.stored_bytes(5, 72) == sum(tensor.nbytes for tensor in tensors.values())
    back = Blocks.from_stored(tensors, style, 72)
    np.testing.assert_array_equal(back.dequantized(), blocks.dequantized())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_search_for_a_runtime_offers_what_the_runtime_takes(runtime: str) -> None:
    chosen = RUNTIMES[runtime]
    assert all(chosen.accepts(style) for style in (*chosen.formats, *chosen.table))


def test_three_bits_are_not_for_the_cpu() -> None:
    assert not RUNTIMES["cpu"].accepts(Format.parse("int3-b32-asym"))


@pytest.mark.parametrize("columns", [64, 100, 128, 192])
def test_tensorrt_takes_whole_blocks_only(columns: int) -> None:
    runtime = RUNTIMES["tensorrt"]
    assert runtime.accepts(Format.parse("int4-b64-sym"), columns) == (columns % 64 == 0)
    assert runtime.accepts(Format.parse("int4-b128-sym"), columns) == (columns % 128 == 0)
    assert runtime.accepts(Format.parse("int8-row-sym"), columns)
    assert RUNTIMES["cpu"].accepts(Format.parse("int4-b64-asym"), columns)
