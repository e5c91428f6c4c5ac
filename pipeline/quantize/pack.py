"""Codes of 2 to 8 bits in bytes, the first code in the lowest bits, and back."""

from __future__ import annotations

import numpy as np


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


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes that `pack_codes` put along the last axis, uint8 [..., count]."""
    places = np.unpackbits(packed, axis=-1, bitorder="little", count=count * bits)
    slots = places.reshape(*packed.shape[:-1], count, bits)
    values: np.ndarray = (slots << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return values
