"""Codes as the kernels of `trt_plugins/block_skip` read them: those of W^T, row by row.

Of 8 bits a byte holds one, signed. Of 4 bits it holds two neighbours of a row, the even one in the
low half, both signed; a row of odd width ends in an empty half. Scales are [groups, m], a group so
many rows of W^T, in whole units of 16.
"""

from __future__ import annotations

import numpy as np

from pipeline.quantize.formats import KERNEL_BLOCK_UNIT, Format
from pipeline.quantize.groupwise import Blocks

_HALF = 4  # bits of half a byte


def kernel_block(format: Format, columns: int) -> int:
    """Rows of W^T to a scale; of one scale to a column all of them, and what fills a unit."""
    return format.block or -(-columns // KERNEL_BLOCK_UNIT) * KERNEL_BLOCK_UNIT


def signed_codes(blocks: Blocks) -> np.ndarray:
    """Codes of W^T about zero, int8 [n, m]; of a symmetric format."""
    centred = blocks.codes.astype(np.int16) - 2 ** (blocks.bits - 1)
    codes: np.ndarray = centred.reshape(len(centred), -1)[:, : blocks.columns].T.astype(np.int8)
    return codes


def kernel_codes(blocks: Blocks) -> np.ndarray:
    """Codes of W^T, int8 [n, m] or, of 4 bits, [n, (m + 1) / 2]; of a symmetric format."""
    codes = signed_codes(blocks)
    return _two_to_a_byte(codes) if blocks.bits == _HALF else codes


def _two_to_a_byte(codes: np.ndarray) -> np.ndarray:
    """Codes of -8 to 7, int8 [n, m], in the halves of int8 [n, (m + 1) / 2]."""
    halves = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).view(np.uint8) & 15
    both: np.ndarray = (halves[:, ::2] | halves[:, 1::2] << 4).view(np.int8)
    return both
