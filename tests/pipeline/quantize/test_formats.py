"""Formats: names, sizes as they are stored, and who takes them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.quantize.blocks import quantize_blocks
from pipeline.quantize.formats import BITS, RUNTIMES, Format, parse_format
from pipeline.quantize.pack import pack_codes


@pytest.mark.parametrize("name", ["int4-b32-asym", "int8-row-sym", "int3-b64-sym"])
def test_a_format_is_found_by_its_name(name: str) -> None:
    assert parse_format(name).name == name


@pytest.mark.parametrize("name", ["int4", "int5-b32-sym", "int4-b32-odd", "four-b32-sym", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"int4-b32-asym|one of"):
        parse_format(name)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [0, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_bytes_are_those_of_the_packed_arrays(
    bits: int, block: int, symmetric: bool
) -> None:
    style = Format(bits, block, symmetric)
    weight = np.random.default_rng(0).normal(size=(5, 72)).astype(np.float32)
    blocks = quantize_blocks(weight, bits, style.width(72), symmetric=symmetric)
    codes = pack_codes(blocks.codes.reshape(5, -1), bits).nbytes
    zeros = 0 if blocks.zero_points is None else pack_codes(blocks.zero_points, bits).nbytes
    assert style.stored_bytes(5, 72) == codes + zeros + 2 * blocks.scales.size


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_search_for_a_runtime_offers_what_the_runtime_takes(runtime: str) -> None:
    chosen = RUNTIMES[runtime]
    assert all(chosen.accepts(style) for style in (*chosen.formats, *chosen.table))


def test_three_bits_are_not_for_the_cpu() -> None:
    assert not RUNTIMES["cpu"].accepts(parse_format("int3-b32-asym"))


@pytest.mark.parametrize("columns", [64, 100, 128, 192])
def test_tensorrt_takes_whole_blocks_only(columns: int) -> None:
    runtime = RUNTIMES["tensorrt"]
    assert runtime.accepts(parse_format("int4-b64-sym"), columns) == (columns % 64 == 0)
    assert runtime.accepts(parse_format("int4-b128-sym"), columns) == (columns % 128 == 0)
    assert runtime.accepts(parse_format("int8-row-sym"), columns)
    assert RUNTIMES["cpu"].accepts(parse_format("int4-b64-asym"), columns)
