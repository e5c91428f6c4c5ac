"""Round to nearest in blocks along a row: w = (code - zero point) * scale.

One scale for every block of weights that are multiplied with neighbouring inputs, as ONNX's
block-wise formats have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Ranges shorter than the block's own: clipping the largest weight lets the others be finer.
SHRINKAGES = np.linspace(1.0, 0.7, 16, dtype=np.float32)


@dataclass(frozen=True)
class Blocks:
    """A matrix [m, n] in few bits; n is padded to whole blocks.

    Attributes:
        codes: uint8 [m, blocks, block], each below 2^bits.
        scales: float32 [m, blocks].
        zero_points: uint8 [m, blocks]; None stands for 2^(bits - 1) everywhere.
        bits: of a code.
        columns: n.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    columns: int


def quantize_blocks(weight: np.ndarray, bits: int, block: int, *, symmetric: bool) -> Blocks:
    """Round a matrix to the grid that is best for each block.

    Args:
        weight: float [m, n].
        bits: of a code, 2 to 8.
        block: weights that share a scale.
        symmetric: zero points in the middle of the range, which then need not be stored; else
            between the block's least and greatest weight. For each block the range is the one
            among `SHRINKAGES` with the least squared error.

    Raises:
        ValueError: another number of bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {bits}")
    padded = pad_to_blocks(weight.astype(np.float32), block)
    lowest, highest = _ranges(padded, symmetric)
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    least = np.full(lowest.shape, np.inf, np.float32)
    for shrinkage in SHRINKAGES:
        grid = _grid(lowest * shrinkage, highest * shrinkage, bits, symmetric)
        codes = _round(padded, *grid, bits)
        error = np.square(_value(codes, *grid) - padded).sum(axis=-1)
        better = error < least
        least = np.where(better, error, least)
        best = (codes, *grid) if best is None else _choose(better, (codes, *grid), best)
    assert best is not None
    codes, scales, zero_points = best
    stored = None if symmetric else zero_points.astype(np.uint8)
    return Blocks(codes.astype(np.uint8), scales, stored, bits, weight.shape[1])


def dequantize_blocks(blocks: Blocks) -> np.ndarray:
    """The matrix that the codes stand for, float32 [m, n]."""
    zero_points = blocks.zero_points
    if zero_points is None:
        zero_points = np.full(blocks.scales.shape, 2 ** (blocks.bits - 1), np.uint8)
    values = _value(blocks.codes, blocks.scales, zero_points)
    return values.reshape(len(values), -1)[:, : blocks.columns]


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis into bytes, the first in the lowest bits; the last byte is padded.

    Args:
        codes: uint8 [..., k], each below 2^bits.
        bits: 2, 4 or 8.

    Returns:
        uint8 [..., ceil(k bits / 8)].

    Raises:
        ValueError: codes that straddle bytes.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"codes of {bits} bits straddle bytes")
    each = 8 // bits
    missing = -codes.shape[-1] % each
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    slots = padded.reshape(*codes.shape[:-1], -1, each)
    shifts = (np.arange(each) * bits).astype(np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(slots << shifts, axis=-1)
    return packed


def pad_to_blocks(weight: np.ndarray, block: int) -> np.ndarray:
    """[m, n] as [m, blocks, block], with zeros behind."""
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % block)))
    return padded.reshape(rows, -1, block)


def _ranges(padded: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of each block, zero among them."""
    if symmetric:
        highest = np.abs(padded).max(axis=-1)
        return -highest, highest
    return np.minimum(padded.min(axis=-1), 0), np.maximum(padded.max(axis=-1), 0)


def _grid(
    lowest: np.ndarray, highest: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of grids that reach from `lowest` to `highest`."""
    steps = 2**bits - (2 if symmetric else 1)
    width = highest - lowest
    scales = np.where(width > 0, width / steps, np.float32(1)).astype(np.float32)
    if symmetric:
        return scales, np.full(scales.shape, 2 ** (bits - 1), np.float32)
    return scales, np.clip(np.rint(-lowest / scales), 0, steps).astype(np.float32)


def _round(
    padded: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int
) -> np.ndarray:
    codes = np.rint(padded / scales[..., None]) + zero_points[..., None]
    clipped: np.ndarray = np.clip(codes, 0, 2**bits - 1)
    return clipped


def _value(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray) -> np.ndarray:
    value: np.ndarray = (codes.astype(np.float32) - zero_points[..., None]) * scales[..., None]
    return value


def _choose(
    better: np.ndarray, new: tuple[np.ndarray, ...], old: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes, scales, zero_points = (
        np.where(better[..., None] if a.ndim > better.ndim else better, a, b)
        for a, b in zip(new, old, strict=True)
    )
    return codes, scales, zero_points
