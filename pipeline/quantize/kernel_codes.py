"""Codes as the kernels of `trt_plugins/block_skip` read them: those of W^T, row by row.

Of 8 bits a byte holds one, signed. Of 4 bits it holds two neighbours of a row, the even one in the
low half, both signed; a row of odd width ends in an empty half. Scales are [groups, m], a group so
many rows of W^T, in whole units of 16. Codes of other widths are held in the next one.
"""

from __future__ import annotations

import numpy as np

from pipeline.quantize.formats import KERNEL_BLOCK_UNIT, Format
from pipeline.quantize.groupwise import Blocks

_HALF = 4  # bits of half a byte


def kernel_bits(bits: int) -> int:
    """The narrowest codes of the kernels that hold codes of so many bits: 4 or 8."""
    return _HALF if bits <= _HALF else 2 * _HALF


def kernel_block(format: Format, columns: int) -> int:
    """Rows of W^T to a scale; of one scale to a column all of them, and what fills a unit."""
    return format.block or -(-columns // KERNEL_BLOCK_UNIT) * KERNEL_BLOCK_UNIT


def signed_codes(blocks: Blocks) -> np.ndarray:
    """Codes of W^T about the middle one, which is zero in symmetric formats, int8 [n, m]."""
    centred = blocks.codes.astype(np.int16) - 2 ** (blocks.bits - 1)
    codes: np.ndarray = centred.reshape(len(centred), -1)[:, : blocks.columns].T.astype(np.int8)
    return codes


def kernel_codes(blocks: Blocks) -> np.ndarray:
    """Codes of W^T about the middle one, int8 [n, m] or, of `kernel_bits` 4, [n, (m + 1) / 2]."""
    codes = signed_codes(blocks)
    return _two_to_a_byte(codes) if kernel_bits(blocks.bits) == _HALF else codes


def kernel_rests(blocks: Blocks) -> np.ndarray | None:
    """What W^T has beyond those codes times their scales, float32 [groups, m]; None for nothing."""
    return None if blocks.zero_points is None else blocks.rests.T


def _two_to_a_byte(codes: np.ndarray) -> np.ndarray:
    """Codes of -8 to 7, int8 [n, m], in the halves of int8 [n, (m + 1) / 2]."""
    halves = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).view(np.uint8) & 15
    both: np.ndarray = (halves[:, ::2] | halves[:, 1::2] << 4).view(np.int8)
    return both
