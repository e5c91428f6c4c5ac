"""The operators in NumPy: the specification that every implementation is tested against.

    MatMulBlocks     y = x W^T + bias,  w = (code - zero) scale + rest
    BlockSkipBlocks  y = (x1 + x2 A^T) B^T,  [x1 x2] = x[..., index]
    LookUpBlocks     y = W[ids]

As in ONNX Runtime's MatMulNBits with accuracy_level 4, every block of a row of x is rounded to 8
bits before it meets the codes; the rest of a block meets the sum of the numbers as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LARGEST = np.float32(127)


@dataclass(frozen=True)
class Matrix:
    """The inputs of a node that hold W, and its attributes.

    Attributes:
        codes: uint8 [N, blocks, block * bits / 8], the first code in the lowest bits.
        scales: float32 [N, blocks].
        bits: of a code: 2, 4 or 8.
        columns: K; the last block may be longer than what is left.
        zeros: uint8 [N, (blocks * bits + 7) / 8], packed likewise; None counts from the middle.
        rests: float32 [blocks, N]; None adds nothing.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    columns: int
    zeros: np.ndarray | None = None
    rests: np.ndarray | None = None

    @property
    def block(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[2] * 8 // self.bits

    def whole_numbers(self) -> np.ndarray:
        """Codes less what they are counted from, int64 [N, blocks, block]."""
        rows, blocks, _ = self.codes.shape
        codes = unpacked(self.codes, self.bits)
        if self.zeros is None:
            return codes - (1 << (self.bits - 1))
        return codes - unpacked(self.zeros, self.bits)[:, :blocks].reshape(rows, blocks, 1)


def matmul_blocks(x: np.ndarray, matrix: Matrix, bias: np.ndarray | None = None) -> np.ndarray:
    """Compute the node.

    Args:
        x: float32 [..., K].
        matrix: W.
        bias: float32 [N].

    Returns:
        float64 [..., N]: x is rounded as in float32, and no sum is.
    """
    blocks = matrix.codes.shape[1]
    padded = np.zeros((*x.shape[:-1], blocks * matrix.block), np.float32)
    padded[..., : matrix.columns] = x
    cut = padded.reshape(*x.shape[:-1], blocks, matrix.block)
    codes, steps = rounded_blocks(cut)
    dots = np.einsum("...bi,jbi->...bj", codes, matrix.whole_numbers())
    y = np.einsum("...bj,...b,jb->...j", dots, steps.astype(np.float64), matrix.scales)
    if matrix.rests is not None:
        y = y + cut.sum(axis=-1, dtype=np.float64) @ matrix.rests
    return y if bias is None else y + bias


def block_skip_blocks(
    x: np.ndarray, a: Matrix, b: Matrix, index: np.ndarray | None = None
) -> np.ndarray:
    """Compute the node of two factors.

    Args:
        x: float32 [..., n].
        a: [r, n - r].
        b: [N, r].
        index: int32 [n]; None where x is in order.

    Returns:
        float64 [..., N].
    """
    rank = len(a.codes)
    ordered = x if index is None else x[..., index]
    latent = ordered[..., :rank] + matmul_blocks(ordered[..., rank:], a)
    return matmul_blocks(latent.astype(np.float32), b)


def look_up_blocks(ids: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Rows of a matrix as numbers, float32 [..., K] of int64 ids [...]."""
    numbers = matrix.whole_numbers()[ids].astype(np.float32) * matrix.scales[ids][..., None]
    return numbers.reshape(*ids.shape, -1)[..., : matrix.columns]


def rounded_blocks(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round blocks to 8 bits: codes int64 [..., blocks, block], steps float32 [..., blocks]."""
    steps = np.abs(x).max(axis=-1) / _LARGEST
    inverse = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=steps > 0)
    return np.rint(x * inverse[..., None]).astype(np.int64), steps


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes out of bytes along the last axis, int64."""
    shifts = np.arange(0, 8, bits)
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.int64)
