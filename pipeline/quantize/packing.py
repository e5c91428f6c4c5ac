"""A quantised matrix as the tensors that a checkpoint holds, and back.

`{name}.codes`, `{name}.scales` and, in formats that have them, `{name}.zero_points` or
`{name}.offsets`, as `pipeline.checkpoint.modeling_skipcat.QuantizedWeight` registers them.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks

_CODES, _SCALES, _ZERO_POINTS, _OFFSETS = "codes", "scales", "zero_points", "offsets"


def stored_tensors(blocks: Blocks) -> dict[str, torch.Tensor]:
    """A quantised matrix as a checkpoint holds it.

    Returns:
        codes uint8 [m, bytes], scales int16 [m, blocks], and, in formats that have them, zero
        points uint8 [m, bytes] or offsets int16 [m, blocks].
    """
    rows = len(blocks.codes)
    tensors = {
        _CODES: torch.from_numpy(pack_codes(blocks.codes.reshape(rows, -1), blocks.bits)),
        _SCALES: _float16_bits(blocks.scales),
    }
    if blocks.has_offsets:
        tensors[_OFFSETS] = _float16_bits(blocks.offsets)
    elif blocks.zero_points is not None:
        tensors[_ZERO_POINTS] = torch.from_numpy(pack_codes(blocks.zero_points, blocks.bits))
    return tensors


def blocks_of(tensors: dict[str, torch.Tensor], format: Format, columns: int) -> Blocks:
    """The inverse of `stored_tensors`.

    Args:
        tensors: by the names it gives them.
        format: the format they are in.
        columns: n of the matrix.
    """
    width, count = format.width(columns), format.blocks(columns)
    codes = _unpack_codes(tensors[_CODES].numpy(), format.bits, count * width)
    scales = _from_float16_bits(tensors[_SCALES])
    zero_points = None
    if format.zero == "offset":
        zero_points = -_from_float16_bits(tensors[_OFFSETS]) / scales
    elif format.zero == "asym":
        zero_points = _unpack_codes(tensors[_ZERO_POINTS].numpy(), format.bits, count)
    return Blocks(
        codes.reshape(len(codes), count, width), scales, zero_points, format.bits, columns
    )


def rows_of(blocks: Blocks, start: int, stop: int) -> Blocks:
    """Some rows of a quantised matrix."""
    zero_points = None if blocks.zero_points is None else blocks.zero_points[start:stop]
    part = blocks.codes[start:stop], blocks.scales[start:stop], zero_points
    return Blocks(*part, blocks.bits, blocks.columns)


def _float16_bits(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.float16).view(np.int16))


def _from_float16_bits(bits: torch.Tensor) -> np.ndarray:
    return bits.numpy().view(np.float16).astype(np.float32)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis into bytes; the last byte is padded.

    Where `bits` divides 8 this is how ONNX Runtime and ONNX's 4-bit types lay them out; codes of
    3 and 6 bits straddle bytes.

    Args:
        codes: uint8 [..., k], each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(k bits / 8)].

    Raises:
        ValueError: another number of bits.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits do not fit a byte")
    if 8 % bits:
        every = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
        flat = every.reshape(*codes.shape[:-1], -1)
        return np.packbits(flat.astype(np.uint8), axis=-1, bitorder="little")
    each = 8 // bits
    missing = -codes.shape[-1] % each
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    slots = padded.reshape(*codes.shape[:-1], -1, each)
    shifts = (np.arange(each) * bits).astype(np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(slots << shifts, axis=-1)
    return packed


def _unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes that `pack_codes` put along the last axis, uint8 [..., count]."""
    places = np.unpackbits(packed, axis=-1, bitorder="little", count=count * bits)
    slots = places.reshape(*packed.shape[:-1], count, bits)
    values: np.ndarray = (slots << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return values
