"""Round a matrix so that later weights make up for the errors of earlier ones, on both sides.

min over grid points Q of tr(G E S E^T), E = W - Q, with S = E[x x^T] of the inputs and G of the
outputs (see `pipeline.compress.factorize.whitened_svd`): the Hessian of the weights is S (x) G.

- along a row (GPTQ: Frantar et al. 2023): with S^-1 = U^T U, the error e_j of column j moves the
  columns behind it by -(e_j / U[j, j]) U[j, j+1:];
- down the rows, in blocks: once the error E_R of a block of rows is known, the best that the rows
  behind it can do is to move by -G_bb^-1 G_bR E_R, whatever S is. With G^-1 = V^T V that is
  V[R, b]^T V[R, R]^-T E_R.

Columns are taken by falling S[j, j], rows by falling G[i, i]. The grids are fixed before, so the
order is free.

What that will cost is estimated without rounding: what is left of tr(G E S E^T) is
sum_ij g_i d_j e_ij^2, d_j the variance of input j that the inputs taken before it do not explain
(the pivots of S), g_i likewise of output i, and e_ij what a weight that may be anywhere on its grid
is away from it: the error of rounding to the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch

from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import BITS_TO_CLIP, Blocks, Grid, pad_to_blocks

_RELATIVE_DAMPING = 1e-2
_ROWS_AT_ONCE = 64
_COLUMNS_AT_ONCE = 64


def gptq(
    weight: torch.Tensor,
    format: Format,
    moment: torch.Tensor,
    sensitivities: Sequence[torch.Tensor] = (),
) -> Blocks:
    """The codes of a matrix, errors fed forward.

    Args:
        weight: W, float [m, n].
        format: the format.
        moment: S, float64 [n, n].
        sensitivities: G of each matrix of a stack, float64 [m_i, m_i]; none weighs all rows alike
            and lets none make up for another: GPTQ.

    Raises:
        ValueError: a moment or sensitivity that is not finite.
    """
    hessian, order, root = _ordered(moment)
    values = weight.detach().float().numpy()
    columns, width = values.shape[1], format.width(values.shape[1])
    grid = Grid.fit(values, format.bits, width, zero=format.zero, importance=np.diagonal(hessian))
    upper = _inverse_of(root)
    spread = _spread(grid, width, order)
    codes, places = (np.empty((len(values), columns), np.float32) for _ in range(2))
    for start, stop, sensitivity in _matrices(len(values), sensitivities):
        codes[start:stop], places[start:stop] = _down_the_rows(
            values[start:stop], spread.rows(slice(start, stop)), upper, sensitivity
        )
    back = np.argsort(order)
    padded, rests = _padded_codes(codes[:, back], grid, width), (places - codes)[:, back]
    blocks = grid.stored(padded, zero=format.zero, columns=columns)
    return replace(blocks, rests_of_codes=pad_to_blocks(rests, width))


@dataclass(frozen=True)
class _Spread:
    """The grid of every single weight, float32 [m, n]; columns in the order they are taken."""

    scales: np.ndarray
    zero_points: np.ndarray
    order: np.ndarray
    largest: int

    def rows(self, chosen: slice | np.ndarray) -> _Spread:
        """The grid of some rows."""
        return _Spread(self.scales[chosen], self.zero_points[chosen], self.order, self.largest)


def _spread(grid: Grid, width: int, order: np.ndarray) -> _Spread:
    block = order // width
    largest = 2**grid.bits - 1
    return _Spread(grid.scales[:, block], grid.zero_points[:, block], order, largest)


def _matrices(
    rows: int, sensitivities: Sequence[torch.Tensor]
) -> list[tuple[int, int, torch.Tensor | None]]:
    """First row, row behind the last, and G of each matrix of a stack."""
    if not sensitivities:
        return [(0, rows, None)]
    stops = np.cumsum([len(block) for block in sensitivities]).tolist()
    return list(zip([0, *stops[:-1]], stops, sensitivities, strict=True))


def _down_the_rows(
    values: np.ndarray, spread: _Spread, upper: np.ndarray, sensitivity: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of one matrix, and what they were before they were rounded; both float32 [m, n].

    Columns are in the order they are taken.
    """
    if sensitivity is None:
        return _along_rows(values[:, spread.order], spread, upper)[:2]
    _, order, upper_root = _ordered(sensitivity)
    root = _inverse_of(upper_root)
    target = values[np.ix_(order, spread.order)]
    codes, places = np.empty_like(target), np.empty_like(target)
    for start in range(0, len(target), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(target))
        part, own = spread.rows(order[start:stop]), slice(start, stop)
        codes[own], places[own], error = _along_rows(target[own], part, upper)
        solved = scipy.linalg.solve_triangular(root[start:stop, start:stop], error, trans="T")
        target[stop:] -= root[start:stop, stop:].T @ solved
    back = np.argsort(order)
    return codes[back], places[back]


def _along_rows(
    values: np.ndarray, spread: _Spread, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of some rows, before they were rounded, and what they miss of `values`; float32 [k, n].

    Columns behind the current tile are moved once a tile, by one matrix product.
    """
    # Columns become rows, which lie together in memory.
    moved = np.ascontiguousarray(values.T)
    scales, zeros = (np.ascontiguousarray(a.T) for a in (spread.scales, spread.zero_points))
    codes, places, rounded = (np.empty_like(moved) for _ in range(3))
    for start in range(0, len(moved), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(moved))
        steps = np.empty_like(moved[start:stop])
        for j in range(start, stop):
            code = moved[j] / scales[j]
            code += zeros[j]
            places[j] = code
            np.rint(code, out=code)
            np.clip(code, 0, spread.largest, out=code)
            codes[j] = code
            rounded[j] = (code - zeros[j]) * scales[j]
            step = steps[j - start]
            np.divide(moved[j] - rounded[j], upper[j, j], out=step)
            moved[j + 1 : stop] -= upper[j, j + 1 : stop, None] * step
        moved[stop:] -= upper[start:stop, stop:].T @ steps
    return codes.T, places.T, values - rounded.T


def _padded_codes(codes: np.ndarray, grid: Grid, width: int) -> np.ndarray:
    """[m, n] as [m, blocks, width]; what fills the last block stands for zero, or is near it."""
    padded = pad_to_blocks(codes, width)
    filling = padded.shape[1] * width - codes.shape[1]
    if filling:
        nearest_zero = np.rint(grid.zero_points[:, -1, None]).clip(0, 2**grid.bits - 1)
        padded[:, -1, width - filling :] = nearest_zero
    return padded


def _ordered(moment: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The damped moment, the order in which its rows are taken, and its root in that order."""
    matrix = _damped(moment)
    order = _falling(matrix)
    return matrix, order, _upper_root(matrix[np.ix_(order, order)])


def _falling(matrix: np.ndarray) -> np.ndarray:
    """The order in which rows or columns are taken: by falling diagonal."""
    return np.argsort(-np.diagonal(matrix), kind="stable")


def _damped(moment: torch.Tensor) -> np.ndarray:
    """The moment with a hundredth of its mean diagonal added, float64 [n, n].

    Raises:
        ValueError: a moment that is not finite.
    """
    matrix = moment.double().numpy()
    if not np.isfinite(matrix).all():
        raise ValueError("the second moment holds NaN or infinite values")
    mean = float(np.diagonal(matrix).mean())
    # A zero moment leaves rounding to the nearest.
    return matrix + (_RELATIVE_DAMPING * mean if mean > 0 else 1.0) * np.eye(len(matrix))


def _upper_root(matrix: np.ndarray) -> np.ndarray:
    """Upper triangular M with M M^T = S, float64 [n, n].

    M[j, j]^2 is the variance of input j that the inputs behind it do not explain. The inverse U of
    M has U^T U = S^-1.
    """
    flipped = torch.from_numpy(matrix[::-1, ::-1].copy())
    root = torch.linalg.cholesky(flipped).numpy()
    return root[::-1, ::-1].copy()


def _inverse_of(root: np.ndarray) -> np.ndarray:
    """The inverse of an upper triangular matrix, float32."""
    identity = torch.eye(len(root), dtype=torch.float64)
    solved = torch.linalg.solve_triangular(torch.from_numpy(root), identity, upper=True)
    return solved.float().numpy()


# The rows of a matrix have much the same error: so many of them tell what all have.
_SAMPLED_ROWS = 96


@dataclass(frozen=True)
class InputPivots:
    """What an error in a column costs.

    Attributes:
        pivots: d_j, float64 [n].
        importance: S[j, j], which decides the grids, float64 [n].
    """

    pivots: np.ndarray
    importance: np.ndarray

    @classmethod
    def of(cls, moment: torch.Tensor) -> InputPivots:
        """From S of the input, float64 [n, n].

        d_j = M[j, j]^2 with M M^T = S, columns taken by falling S[j, j].

        Raises:
            ValueError: a moment that is not finite.
        """
        hessian, order, root = _ordered(moment)
        pivots = np.empty(len(hessian))
        pivots[order] = np.square(np.diagonal(root))
        return cls(pivots, np.diagonal(hessian))


def output_pivots(sensitivities: Sequence[torch.Tensor]) -> np.ndarray | None:
    """g_i, float64 [m], from G of each matrix of a stack; None for none.

    Rows are taken in blocks, those of one block as if they were independent.

    Raises:
        ValueError: a sensitivity that is not finite.
    """
    parts = [_block_pivots(block) for block in sensitivities]
    return np.concatenate(parts) if parts else None


def expected_error(
    weight: torch.Tensor, format: Format, inputs: InputPivots, outputs: np.ndarray | None
) -> float:
    """Half of tr(G E S E^T) that rounding is expected to leave; nats where G is the Fisher's.

    Args:
        weight: W, float [m, n].
        format: the format.
        inputs: of its columns.
        outputs: of its rows; None weighs all alike.
    """
    rows, columns = weight.shape
    sample = np.linspace(0, rows - 1, min(rows, _SAMPLED_ROWS)).round().astype(int)
    values, width = weight.detach().float().numpy()[sample], format.width(columns)
    importance = inputs.importance
    grid = Grid.fit(values, format.bits, width, zero=format.zero, importance=importance)
    pivots = pad_to_blocks(inputs.pivots[None], width)
    if format.bits >= BITS_TO_CLIP:
        by_row = (np.square(grid.scales) / 12 * pivots.sum(axis=-1)).sum(axis=-1)
    else:
        padded = pad_to_blocks(values, width)
        error = grid.values(grid.codes(padded)) - padded
        by_row = (np.square(error) * pivots).sum(axis=(-2, -1))
    weights = np.ones(rows) if outputs is None else outputs
    share = weights.sum() / weights[sample].sum()
    return float(by_row @ weights[sample]) * share / 2


def _block_pivots(sensitivity: torch.Tensor) -> np.ndarray:
    matrix, order, root = _ordered(sensitivity)
    result = np.empty(len(matrix))
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(matrix))
        part = root[start:stop, start:stop]
        result[order[start:stop]] = np.square(part).sum(axis=1)
    return result
