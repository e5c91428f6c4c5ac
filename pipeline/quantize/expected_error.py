"""What rounding a matrix will cost, without rounding it.

With errors fed forward (`pipeline.quantize.gptq`), what is left of tr(G E S E^T) is
sum_ij g_i d_j e_ij^2: d_j is the variance of input j that the inputs taken before it do not explain
(the pivots of S), g_i likewise of output i, and e_ij what a weight that may be anywhere on its grid
is away from it: the error of rounding to the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.quantize.formats import Format
from pipeline.quantize.gptq import ROWS_AT_ONCE, damped, falling, upper_root
from pipeline.quantize.groupwise import BITS_TO_CLIP, fit_grid, pad_to_blocks

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


def input_pivots(moment: torch.Tensor) -> InputPivots:
    """From S of the input, float64 [n, n].

    d_j = M[j, j]^2 with M M^T = S, columns taken by falling S[j, j].

    Raises:
        ValueError: a moment that is not finite.
    """
    hessian = damped(moment)
    order = falling(hessian)
    pivots = np.empty(len(hessian))
    root = upper_root(hessian[np.ix_(order, order)])
    pivots[order] = np.square(np.diagonal(root))
    return InputPivots(pivots, np.diagonal(hessian))


def output_pivots(sensitivities: Sequence[torch.Tensor]) -> np.ndarray | None:
    """g_i, float64 [m], from G of each matrix of a stack; None for none.

    Rows are taken in blocks, those of one block as if they were independent.

    Raises:
        ValueError: a sensitivity that is not finite.
    """
    parts = [_block_pivots(damped(block)) for block in sensitivities]
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
    grid = fit_grid(values, format.bits, width, zero=format.zero, importance=importance)
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


def _block_pivots(matrix: np.ndarray) -> np.ndarray:
    order = falling(matrix)
    root = upper_root(matrix[np.ix_(order, order)])
    result = np.empty(len(matrix))
    for start in range(0, len(matrix), ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, len(matrix))
        part = root[start:stop, start:stop]
        result[order[start:stop]] = np.square(part).sum(axis=1)
    return result
