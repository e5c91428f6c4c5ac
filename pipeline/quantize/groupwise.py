"""Grids in blocks along a row, and rounding to the nearest: w = (code - zero point) * scale.

One scale for every block of weights that are multiplied with neighbouring inputs, as ONNX's
block-wise formats have it. Scales are numbers of float16, so that they are the same wherever they
are stored. A zero point that is no whole number stands for an offset, -zero point * scale, which
is a number of float16 likewise.

Whether a matrix is on the grids of a format already, as one read from a GGUF file may be; and a
quantised matrix as the tensors that a checkpoint holds, and back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.quantize.formats import Format, Zero
from pipeline.quantize.slices import slices

# Ranges shorter than the block's own: clipping the largest weight lets the others be finer.
_SHRINKAGES = np.linspace(1.0, 0.7, 16, dtype=np.float32)
# With so many codes nothing is gained by clipping.
BITS_TO_CLIP = 6
# A root mean square error of so many steps is none.
_EXACT_STEPS = np.float32(1e-4)
# Of the widest matrices every copy is gigabytes.
_ROWS_AT_ONCE = 2048
_SMALLEST_SCALE = np.float32(2.0**-24)


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix [m, n]; n is padded to whole blocks.

    Attributes:
        codes: uint8 [m, blocks, block], each below 2^bits.
        scales: float32 [m, blocks], each a number of float16.
        zero_points: uint8 [m, blocks]; float32 where there are offsets; None stands for
            2^(bits - 1) everywhere.
        bits: of a code.
        columns: n.
        rests_of_codes: what rounding took from the codes, float32 as `codes`; None where it is not
            known. It is not stored.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int
    columns: int
    rests_of_codes: np.ndarray | None = None

    @property
    def has_offsets(self) -> bool:
        """Whether codes are counted from offsets."""
        return self.zero_points is not None and self.zero_points.dtype == np.float32

    @property
    def offsets(self) -> np.ndarray:
        """What the code 0 stands for in formats with offsets, float32 [m, blocks]."""
        assert self.zero_points is not None
        return as_float16(-self.zero_points * self.scales)

    @property
    def rests(self) -> np.ndarray:
        """What a weight has beyond (code - 2^(bits - 1)) * scale, float32 [m, blocks]."""
        middle = np.float32(2 ** (self.bits - 1))
        rests = np.zeros_like(self.scales)
        if self.has_offsets:
            rests = self.offsets + middle * self.scales
        elif self.zero_points is not None:
            rests = (middle - self.zero_points.astype(np.float32)) * self.scales
        return rests

    def dequantized(self) -> np.ndarray:
        """What the codes stand for, float32 [m, n]."""
        zero_points = self.zero_points
        if zero_points is None:
            zero_points = np.full(self.scales.shape, 2 ** (self.bits - 1), np.float32)
        grid = Grid(self.scales, zero_points.astype(np.float32), self.bits)
        values = grid.values(self.codes)
        return values.reshape(len(values), -1)[:, : self.columns]

    def values(self) -> torch.Tensor:
        """What the codes stand for, float64 [m, n]."""
        return torch.from_numpy(self.dequantized()).double()

    def values_of(self, rows: slice) -> torch.Tensor:
        """The same of some rows, float64 [k, n]."""
        return self.rows(rows.start, rows.stop).values()

    def rows(self, start: int, stop: int) -> Blocks:
        """Some of the rows."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        rests = None if self.rests_of_codes is None else self.rests_of_codes[start:stop]
        part = self.codes[start:stop], self.scales[start:stop], zero_points
        return Blocks(*part, self.bits, self.columns, rests)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint holds, named as its `QuantizedWeight` registers them.

        Returns:
            codes uint8 [m, bytes], scales int16 [m, blocks], and, in formats that have them, zero
            points uint8 [m, bytes] or offsets int16 [m, blocks].
        """
        rows = len(self.codes)
        tensors = {
            _CODES: torch.from_numpy(pack_codes(self.codes.reshape(rows, -1), self.bits)),
            _SCALES: _float16_bits(self.scales),
        }
        if self.has_offsets:
            tensors[_OFFSETS] = _float16_bits(self.offsets)
        elif self.zero_points is not None:
            tensors[_ZERO_POINTS] = torch.from_numpy(pack_codes(self.zero_points, self.bits))
        return tensors

    @classmethod
    def from_stored(cls, tensors: dict[str, torch.Tensor], format: Format, columns: int) -> Blocks:
        """The inverse of `stored_tensors`, of a matrix of n columns in that format."""
        width, count = format.width(columns), format.blocks(columns)
        codes = _unpack_codes(tensors[_CODES].numpy(), format.bits, count * width)
        scales = _from_float16_bits(tensors[_SCALES])
        zero_points = None
        if format.zero == "offset":
            zero_points = -_from_float16_bits(tensors[_OFFSETS]) / scales
        elif format.zero == "asym":
            zero_points = _unpack_codes(tensors[_ZERO_POINTS].numpy(), format.bits, count)
        return cls(
            codes.reshape(len(codes), count, width), scales, zero_points, format.bits, columns
        )


@dataclass(frozen=True)
class Grid:
    """The values that the weights of each block may take.

    Attributes:
        scales: float32 [m, blocks], each a number of float16.
        zero_points: float32 [m, blocks]; whole numbers, but for formats with offsets.
        bits: of a code.
    """

    scales: np.ndarray
    zero_points: np.ndarray
    bits: int

    def rows(self, chosen: slice | np.ndarray) -> Grid:
        """The grids of some rows."""
        return Grid(self.scales[chosen], self.zero_points[chosen], self.bits)

    def codes(self, padded: np.ndarray) -> np.ndarray:
        """The nearest code of every weight of [m, blocks, block], float32 of the same shape."""
        codes = np.rint(padded / self.scales[..., None] + self.zero_points[..., None])
        clipped: np.ndarray = np.clip(codes, 0, 2**self.bits - 1)
        return clipped

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What codes [m, blocks, block] stand for, float32."""
        value: np.ndarray = codes.astype(np.float32) - self.zero_points[..., None]
        return value * self.scales[..., None]

    @classmethod
    def fit(
        cls,
        weight: np.ndarray,
        bits: int,
        block: int,
        *,
        zero: Zero,
        importance: np.ndarray | None = None,
    ) -> Grid:
        """For each block the grid, of those that `_candidates` tries, of least squared error.

        Args:
            weight: float [m, n].
            bits: of a code, 2 to 8.
            block: weights that share a scale.
            zero: "sym" has zero points in the middle of the range, and stores none; "asym" in
                the block's range, with 0 on the grid; "offset" anywhere.
            importance: what a squared error costs in each column, [n]; None for all the same.

        Raises:
            ValueError: another number of bits.
        """
        if not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {bits}")
        padded = pad_to_blocks(weight.astype(np.float32, copy=False), block)
        weights = np.ones(weight.shape[1]) if importance is None else importance
        cost = pad_to_blocks(weights[None].astype(np.float32), block)
        grids = _candidates(padded, bits, zero)
        best = next(grids)
        if bits > BITS_TO_CLIP:
            return best
        least = _squared_error(best, padded, cost)
        for grid in grids:
            if (least <= np.square(_EXACT_STEPS * best.scales) * cost.sum(axis=-1)).all():
                break  # the weights were on such grids before
            error = _squared_error(grid, padded, cost)
            better = error < least
            least = np.where(better, error, least)
            best = cls(
                np.where(better, grid.scales, best.scales),
                np.where(better, grid.zero_points, best.zero_points),
                bits,
            )
        return best

    def stored(self, codes: np.ndarray, *, zero: Zero, columns: int) -> Blocks:
        """Codes [m, blocks, block] as they are stored."""
        stored: np.ndarray | None = None
        if zero != "sym":
            stored = self.zero_points.astype(np.uint8 if zero == "asym" else np.float32)
        return Blocks(codes.astype(np.uint8, copy=False), self.scales, stored, self.bits, columns)


def quantize_blocks(
    weight: np.ndarray, bits: int, block: int, *, zero: Zero, importance: np.ndarray | None = None
) -> Blocks:
    """Round every weight of [m, n] to the nearest point of the grid that is best for its block.

    Arguments as in `Grid.fit`.

    Raises:
        ValueError: another number of bits.
    """
    grid = Grid.fit(weight, bits, block, zero=zero, importance=importance)
    codes = grid.codes(pad_to_blocks(weight.astype(np.float32), block))
    return grid.stored(codes, zero=zero, columns=weight.shape[1])


def pad_to_blocks(weight: np.ndarray, block: int) -> np.ndarray:
    """[m, n] as [m, blocks, block], with zeros behind; a view where there are none."""
    rows, columns = weight.shape
    missing = -columns % block
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.reshape(rows, -1, block)


def _candidates(padded: np.ndarray, bits: int, zero: Zero) -> Iterator[Grid]:
    """Grids over the whole range of each block first, then over parts of it.

    With offsets the range is cut into fewer steps as well: weights that lie on such a grid
    already, not all of whose codes occur, are then met exactly. Half as many steps are enough,
    since twice the steps of a coarser grid hold its points, too.
    """
    most = 2**bits - (2 if zero == "sym" else 1)
    if zero == "offset":
        lowest, highest = padded.min(axis=-1), padded.max(axis=-1)
        for steps in range(most, most // 2, -1):
            yield _offset_grid(lowest, highest, bits, steps)
        for shrinkage in _SHRINKAGES[1:]:
            cut = (highest - lowest) * (1 - shrinkage) / 2
            yield _offset_grid(lowest + cut, highest - cut, bits, most)
        return
    lowest, highest = _ranges(padded, zero)
    for shrinkage in _SHRINKAGES:
        yield _grid(lowest * shrinkage, highest * shrinkage, bits, most, zero)


def _ranges(padded: np.ndarray, zero: Zero) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest value of each block, zero among them."""
    if zero == "sym":
        highest = np.abs(padded).max(axis=-1)
        return -highest, highest
    return np.minimum(padded.min(axis=-1), 0), np.maximum(padded.max(axis=-1), 0)


def _grid(lowest: np.ndarray, highest: np.ndarray, bits: int, steps: int, zero: Zero) -> Grid:
    """Grids that reach from `lowest` to `highest` and have 0 among their points."""
    scales = _scales(highest - lowest, steps)
    if zero == "sym":
        return Grid(scales, np.full(scales.shape, 2 ** (bits - 1), np.float32), bits)
    return Grid(scales, np.clip(np.rint(-lowest / scales), 0, steps).astype(np.float32), bits)


def _offset_grid(lowest: np.ndarray, highest: np.ndarray, bits: int, steps: int) -> Grid:
    """Grids that begin at `lowest` and reach `highest` in so many steps."""
    scales = _scales(highest - lowest, steps)
    return Grid(scales, -as_float16(lowest) / scales, bits)


def _scales(width: np.ndarray, steps: int) -> np.ndarray:
    exact = np.where(width > 0, width / steps, np.float32(1))
    return np.maximum(as_float16(exact), _SMALLEST_SCALE)


def as_float16(numbers: np.ndarray) -> np.ndarray:
    """The nearest numbers of float16, in float32."""
    return numbers.astype(np.float16).astype(np.float32)


def _squared_error(grid: Grid, padded: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Of each block, [m, blocks]; `cost` is [1, blocks, block]."""
    parts = []
    for rows in slices(len(padded), _ROWS_AT_ONCE):
        own, part = grid.rows(rows), padded[rows]
        parts.append((np.square(own.values(own.codes(part)) - part) * cost).sum(axis=-1))
    return np.concatenate(parts)


# Half a step of 8 bits over -max|w| to max|w|.
_HALF_STEP_OF_8_BITS = 1 / 254


def is_kept_by(format: Format, weight: np.ndarray) -> bool:
    """Whether no weight of [m, n] changes by more than rounding its block to 8 bits may change it.

    Weights that were on such grids and were then stored in float16 or bfloat16 pass, too.
    """
    width = format.width(weight.shape[1])
    rounded = quantize_blocks(weight, format.bits, width, zero=format.zero).dequantized()
    error = np.abs(pad_to_blocks(rounded - weight, width)).max(axis=-1)
    largest = np.abs(pad_to_blocks(weight, width)).max(axis=-1)
    return bool((error <= largest * _HALF_STEP_OF_8_BITS).all())


_CODES, _SCALES, _ZERO_POINTS, _OFFSETS = "codes", "scales", "zero_points", "offsets"


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
