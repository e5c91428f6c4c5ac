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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks, Grid, fit_grid, on_grid, pad_to_blocks

_RELATIVE_DAMPING = 1e-2
ROWS_AT_ONCE = 64
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
    hessian = damped(moment)
    values = weight.detach().float().numpy()
    columns, width = values.shape[1], format.width(values.shape[1])
    grid = fit_grid(values, format.bits, width, zero=format.zero, importance=np.diagonal(hessian))
    order = falling(hessian)
    upper = _inverse_of(upper_root(hessian[np.ix_(order, order)]))
    spread = _spread(grid, width, order)
    codes = np.empty((len(values), columns), np.float32)
    for start, stop, sensitivity in _matrices(len(values), sensitivities):
        codes[start:stop] = _down_the_rows(
            values[start:stop], spread.rows(slice(start, stop)), upper, sensitivity
        )
    back = codes[:, np.argsort(order)]
    return on_grid(_padded_codes(back, grid, width), grid, zero=format.zero, columns=columns)


@dataclass(frozen=True)
class _Spread:
    """The grid of every single weight, columns in the order they are taken.

    Attributes:
        scales: float32 [m, n].
        zero_points: float32 [m, n].
        order: int [n], the columns.
        largest: code.
    """

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
) -> np.ndarray:
    """Codes float32 [m, n] of one matrix, columns in the order they are taken."""
    if sensitivity is None:
        return _along_rows(values[:, spread.order], spread, upper)[0]
    hessian = damped(sensitivity)
    order = falling(hessian)
    root = _inverse_of(upper_root(hessian[np.ix_(order, order)]))
    target = values[np.ix_(order, spread.order)]
    codes = np.empty_like(target)
    for start in range(0, len(target), ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, len(target))
        part = spread.rows(order[start:stop])
        codes[start:stop], error = _along_rows(target[start:stop], part, upper)
        solved = scipy.linalg.solve_triangular(root[start:stop, start:stop], error, trans="T")
        target[stop:] -= root[start:stop, stop:].T @ solved
    result = np.empty_like(codes)
    result[order] = codes
    return result


def _along_rows(
    values: np.ndarray, spread: _Spread, upper: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of some rows, and what they are away from `values`; both float32 [k, n].

    Columns behind the current tile are moved once a tile, by one matrix product.
    """
    # Columns become rows, which lie together in memory.
    moved = np.ascontiguousarray(values.T)
    scales, zeros = (np.ascontiguousarray(a.T) for a in (spread.scales, spread.zero_points))
    codes, rounded = np.empty_like(moved), np.empty_like(moved)
    for start in range(0, len(moved), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(moved))
        steps = np.empty_like(moved[start:stop])
        for j in range(start, stop):
            code = moved[j] / scales[j]
            code += zeros[j]
            np.rint(code, out=code)
            np.clip(code, 0, spread.largest, out=code)
            codes[j] = code
            rounded[j] = (code - zeros[j]) * scales[j]
            step = steps[j - start]
            np.divide(moved[j] - rounded[j], upper[j, j], out=step)
            moved[j + 1 : stop] -= upper[j, j + 1 : stop, None] * step
        moved[stop:] -= upper[start:stop, stop:].T @ steps
    return codes.T, values - rounded.T


def _padded_codes(codes: np.ndarray, grid: Grid, width: int) -> np.ndarray:
    """[m, n] as [m, blocks, width]; what fills the last block stands for zero, or is near it."""
    padded = pad_to_blocks(codes, width)
    filling = padded.shape[1] * width - codes.shape[1]
    if filling:
        nearest_zero = np.rint(grid.zero_points[:, -1, None]).clip(0, 2**grid.bits - 1)
        padded[:, -1, width - filling :] = nearest_zero
    return padded


def falling(matrix: np.ndarray) -> np.ndarray:
    """The order in which rows or columns are taken: by falling diagonal."""
    return np.argsort(-np.diagonal(matrix), kind="stable")


def damped(moment: torch.Tensor) -> np.ndarray:
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


def upper_root(matrix: np.ndarray) -> np.ndarray:
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
