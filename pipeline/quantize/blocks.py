"""Grids in blocks along a row, and rounding to the nearest: w = (code - zero point) * scale.

One scale for every block of weights that are multiplied with neighbouring inputs, as ONNX's
block-wise formats have it. Scales are numbers of float16, so that they are the same wherever they
are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Ranges shorter than the block's own: clipping the largest weight lets the others be finer.
SHRINKAGES = np.linspace(1.0, 0.7, 16, dtype=np.float32)
# With so many codes nothing is gained by clipping.
BITS_TO_CLIP = 6
SMALLEST_SCALE = np.float32(2.0**-24)


@dataclass(frozen=True)
class Blocks:
    """A matrix [m, n] in few bits; n is padded to whole blocks.

    Attributes:
        codes: uint8 [m, blocks, block], each below 2^bits.
        scales: float32 [m, blocks], each a number of float16.
        zero_points: uint8 [m, blocks]; None stands for 2^(bits - 1) everywhere.
        bits: of a code.
        columns: n.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    columns: int


@dataclass(frozen=True)
class Grid:
    """The values that the weights of each block may take.

    Attributes:
        scales: float32 [m, blocks], each a number of float16.
        zero_points: float32 [m, blocks], whole numbers.
        bits: of a code.
    """

    scales: np.ndarray
    zero_points: np.ndarray
    bits: int

    def codes(self, padded: np.ndarray) -> np.ndarray:
        """The nearest code of every weight of [m, blocks, block], float32 of the same shape."""
        codes = np.rint(padded / self.scales[..., None]) + self.zero_points[..., None]
        clipped: np.ndarray = np.clip(codes, 0, 2**self.bits - 1)
        return clipped

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What codes [m, blocks, block] stand for, float32."""
        value: np.ndarray = codes.astype(np.float32) - self.zero_points[..., None]
        return value * self.scales[..., None]


def quantize_blocks(
    weight: np.ndarray,
    bits: int,
    block: int,
    *,
    symmetric: bool,
    importance: np.ndarray | None = None,
) -> Blocks:
    """Round every weight to the nearest point of the grid that is best for its block.

    Args:
        weight: float [m, n].
        bits: of a code, 2 to 8.
        block: weights that share a scale.
        symmetric: see `fit_grid`.
        importance: see `fit_grid`.

    Raises:
        ValueError: another number of bits.
    """
    grid = fit_grid(weight, bits, block, symmetric=symmetric, importance=importance)
    codes = grid.codes(pad_to_blocks(weight.astype(np.float32), block))
    return on_grid(codes, grid, symmetric=symmetric, columns=weight.shape[1])


def fit_grid(
    weight: np.ndarray,
    bits: int,
    block: int,
    *,
    symmetric: bool,
    importance: np.ndarray | None = None,
) -> Grid:
    """For each block the grid, among ranges shortened by `SHRINKAGES`, of least squared error.

    Args:
        weight: float [m, n].
        bits: of a code, 2 to 8.
        block: weights that share a scale.
        symmetric: zero points in the middle of the range, which then need not be stored; else
            between the block's least and greatest weight.
        importance: what a squared error costs in each column, [n]; the same everywhere for None.

    Raises:
        ValueError: another number of bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {bits}")
    padded = pad_to_blocks(weight.astype(np.float32), block)
    weights = np.ones(weight.shape[1]) if importance is None else importance
    cost = pad_to_blocks(weights[None].astype(np.float32), block)
    lowest, highest = _ranges(padded, symmetric)
    best = _grid(lowest, highest, bits, symmetric)
    if bits > BITS_TO_CLIP:
        return best
    least = _squared_error(best, padded, cost)
    for shrinkage in SHRINKAGES[1:]:
        grid = _grid(lowest * shrinkage, highest * shrinkage, bits, symmetric)
        error = _squared_error(grid, padded, cost)
        better = error < least
        least = np.where(better, error, least)
        best = Grid(
            np.where(better, grid.scales, best.scales),
            np.where(better, grid.zero_points, best.zero_points),
            bits,
        )
    return best


def on_grid(codes: np.ndarray, grid: Grid, *, symmetric: bool, columns: int) -> Blocks:
    """Codes [m, blocks, block] as they are stored."""
    stored = None if symmetric else grid.zero_points.astype(np.uint8)
    return Blocks(codes.astype(np.uint8), grid.scales, stored, grid.bits, columns)


def dequantize_blocks(blocks: Blocks) -> np.ndarray:
    """The matrix that the codes stand for, float32 [m, n]."""
    zero_points = blocks.zero_points
    if zero_points is None:
        zero_points = np.full(blocks.scales.shape, 2 ** (blocks.bits - 1), np.float32)
    grid = Grid(blocks.scales, zero_points.astype(np.float32), blocks.bits)
    values = grid.values(blocks.codes)
    return values.reshape(len(values), -1)[:, : blocks.columns]


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


def _grid(lowest: np.ndarray, highest: np.ndarray, bits: int, symmetric: bool) -> Grid:
    """Grids that reach from `lowest` to `highest`."""
    steps = 2**bits - (2 if symmetric else 1)
    width = highest - lowest
    exact = np.where(width > 0, width / steps, np.float32(1))
    scales = np.maximum(exact.astype(np.float16).astype(np.float32), SMALLEST_SCALE)
    if symmetric:
        return Grid(scales, np.full(scales.shape, 2 ** (bits - 1), np.float32), bits)
    return Grid(scales, np.clip(np.rint(-lowest / scales), 0, steps).astype(np.float32), bits)


def _squared_error(grid: Grid, padded: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Of each block, [m, blocks]; `cost` is [1, blocks, block]."""
    error: np.ndarray = (np.square(grid.values(grid.codes(padded)) - padded) * cost).sum(axis=-1)
    return error
