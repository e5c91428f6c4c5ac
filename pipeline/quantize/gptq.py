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
from pipeline.quantize.sensitivity import Sensitivity
from pipeline.quantize.slices import slices
from pipeline.quantize.triangular import cholesky_, invert_into_

_RELATIVE_DAMPING = 1e-2
_ROWS_AT_ONCE = 64
_COLUMNS_AT_ONCE = 64
# Of matrices whose rows do not make up for each other.
_ROWS_OF_ANY = 8192


def gptq(
    weight: torch.Tensor,
    format: Format,
    moment: torch.Tensor,
    sensitivities: Sequence[Sensitivity] = (),
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
    importance, order, root = _ordered(moment)
    values = weight.detach().float().numpy()
    columns, width = values.shape[1], format.width(values.shape[1])
    grid = Grid.fit(values, format.bits, width, zero=format.zero, importance=importance)
    upper = _feedback(root)
    del root
    codes, rests = np.empty(values.shape, np.uint8), np.empty(values.shape, np.float32)
    for rows, sensitivity in _matrices(len(values), sensitivities):
        spread = _Spread(grid.rows(rows), width, order)
        _down_the_rows(values[rows], spread, upper, sensitivity, (codes[rows], rests[rows]))
    padded = _padded_codes(codes, grid, width)
    blocks = grid.stored(padded, zero=format.zero, columns=columns)
    return replace(blocks, rests_of_codes=pad_to_blocks(rests, width))


@dataclass(frozen=True)
class _Spread:
    """The grid of every single weight.

    Attributes:
        grid: of some rows.
        width: columns that share a scale.
        order: in which columns are taken.
    """

    grid: Grid
    width: int
    order: np.ndarray

    def of(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points of some rows, float32 [n, k], columns in their order."""
        block, grid = self.order // self.width, self.grid.rows(rows)
        scales, zero_points = (
            np.ascontiguousarray(each.T[block]) for each in (grid.scales, grid.zero_points)
        )
        return scales, zero_points


# Of each weight its code, uint8 [m, n], and what rounding took from it, float32 [m, n].
_Found = tuple[np.ndarray, np.ndarray]


def _matrices(
    rows: int, sensitivities: Sequence[Sensitivity]
) -> list[tuple[slice, Sensitivity | None]]:
    """The rows and G of each matrix of a stack; without G, of parts that memory has room for."""
    if not sensitivities:
        return [(part, None) for part in slices(rows, _ROWS_OF_ANY)]
    stops = np.cumsum([len(block) for block in sensitivities]).tolist()
    parts = map(slice, [0, *stops[:-1]], stops)
    return list(zip(parts, sensitivities, strict=True))


def _down_the_rows(
    values: np.ndarray,
    spread: _Spread,
    upper: np.ndarray,
    sensitivity: Sensitivity | None,
    found: _Found,
) -> None:
    """Round one matrix, float32 [m, n], into `found`."""
    if sensitivity is None:
        _along_rows(values[:, spread.order], spread, upper, slice(None), found)
        return
    _, order, root = _ordered(sensitivity)
    down = _feedback(root)
    del root
    target = values[np.ix_(order, spread.order)]
    for start in range(0, len(target), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(target))
        error = _along_rows(target[start:stop], spread, upper, order[start:stop], found)
        solved = scipy.linalg.solve_triangular(down[start:stop, start:stop], error, trans="T")
        target[stop:] -= down[start:stop, stop:].T @ solved


def _along_rows(
    values: np.ndarray,
    spread: _Spread,
    upper: np.ndarray,
    rows: slice | np.ndarray,
    found: _Found,
) -> np.ndarray:
    """Round some rows, float32 [k, n], columns in the order they are taken, into `found`.

    Columns behind the current tile are moved once a tile, by one matrix product.

    Returns:
        What the codes miss of the values, float32 [k, n].
    """
    # Columns become rows, which lie together in memory.
    moved = np.ascontiguousarray(values.T)
    scales, zeros = spread.of(rows)
    largest = 2**spread.grid.bits - 1
    codes, places, rounded = (np.empty_like(moved) for _ in range(3))
    for start in range(0, len(moved), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(moved))
        steps = np.empty_like(moved[start:stop])
        for j in range(start, stop):
            code = moved[j] / scales[j]
            code += zeros[j]
            places[j] = code
            np.rint(code, out=code)
            np.clip(code, 0, largest, out=code)
            codes[j] = code
            rounded[j] = (code - zeros[j]) * scales[j]
            step = steps[j - start]
            np.divide(moved[j] - rounded[j], upper[j, j], out=step)
            moved[j + 1 : stop] -= upper[j, j + 1 : stop, None] * step
        moved[stop:] -= upper[start:stop, stop:].T @ steps
    back = np.argsort(spread.order)
    found[0][rows] = codes[back].T
    found[1][rows] = (places - codes)[back].T
    return values - rounded.T


def _padded_codes(codes: np.ndarray, grid: Grid, width: int) -> np.ndarray:
    """[m, n] as [m, blocks, width]; what fills the last block stands for zero, or is near it."""
    padded = pad_to_blocks(codes, width)
    filling = padded.shape[1] * width - codes.shape[1]
    if filling:
        nearest_zero = np.rint(grid.zero_points[:, -1, None]).clip(0, 2**grid.bits - 1)
        padded[:, -1, width - filling :] = nearest_zero
    return padded


def _ordered(moment: Sensitivity) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Of a moment with a hundredth of its mean diagonal added, its diagonal, an order, a root.

    Returns:
        The diagonal, float64 [n]; the order in which rows are taken, by falling diagonal; and L
        with L L^T = S with all rows backwards, float64 [n, n]. M, which is L with its own rows and
        columns backwards, is upper triangular with M M^T = S in that order: M[j, j]^2 is the
        variance of input j that the inputs behind it do not explain.

    Raises:
        ValueError: a moment that is not finite.
    """
    matrix = moment.double().numpy()
    if not np.isfinite(matrix.sum()):
        raise ValueError("the second moment holds NaN or infinite values")
    mean = float(np.diagonal(matrix).mean())
    # A zero moment leaves rounding to the nearest.
    damping = _RELATIVE_DAMPING * mean if mean > 0 else 1.0
    diagonal = np.diagonal(matrix) + damping
    order = np.argsort(-diagonal, kind="stable")
    backwards = torch.from_numpy(matrix[np.ix_(order[::-1], order[::-1])])
    backwards.diagonal().add_(damping)
    del matrix
    root = cholesky_(backwards)
    if root is None:
        raise ValueError("the second moment has eigenvalues below zero")
    return diagonal, order, root


def _feedback(root: torch.Tensor) -> np.ndarray:
    """U with U^T U = S^-1, upper triangular, float32 [n, n]: the inverse of M (see `_ordered`)."""
    upper = np.zeros(root.shape, np.float32)
    invert_into_(upper[::-1, ::-1], root)
    return upper


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
        importance, order, root = _ordered(moment)
        pivots = np.empty(len(order))
        pivots[order] = np.square(np.diagonal(root.numpy())[::-1])
        return cls(pivots, importance)


def output_pivots(sensitivities: Sequence[Sensitivity]) -> np.ndarray | None:
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


def _block_pivots(sensitivity: Sensitivity) -> np.ndarray:
    _, order, lower = _ordered(sensitivity)
    root = lower.numpy()[::-1, ::-1]
    result = np.empty(len(order))
    for start in range(0, len(order), _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, len(order))
        part = root[start:stop, start:stop]
        result[order[start:stop]] = np.square(part).sum(axis=1)
    return result
