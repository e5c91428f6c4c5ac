"""Triangular roots of the widest matrices, and their inverses, without copies beside them."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.quantize.slices import slices

_AT_ONCE = 1024


def cholesky_(matrix: torch.Tensor) -> torch.Tensor | None:
    """Lower triangular L with L L^T = S, in the memory of S; None where there is none.

    Args:
        matrix: S, float64 [n, n], symmetric, rows contiguous; overwritten.
    """
    # Columns of what is symmetric are its rows, and LAPACK takes columns.
    root, info = matrix.mT, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(root, out=(root, info))
    return None if int(info) else root


def invert_into_(inverse: np.ndarray, lower: torch.Tensor) -> None:
    """L^-1, computed in float64, some columns at a time.

    With L = [L11 0; L21 L22], a column of blocks of L^-1 is X11 = L11^-1 and, going down,
    X21 = -L22^-1 (L21 X11).

    Args:
        inverse: zeros, float [n, n]; filled at and below its diagonal.
        lower: L, float64 [n, n], lower triangular.
    """
    size = len(lower)
    blocks = list(slices(size, _AT_ONCE))
    for place, own in enumerate(blocks):
        column = torch.zeros(size - own.start, own.stop - own.start, dtype=torch.float64)
        column[: column.shape[1]].fill_diagonal_(1.0)
        for rows in blocks[place:]:
            part = slice(rows.start - own.start, rows.stop - own.start)
            if rows is not own:
                column[part] = -(lower[rows, own.start : rows.start] @ column[: part.start])
            column[part] = torch.linalg.solve_triangular(
                lower[rows, rows], column[part], upper=False
            )
        inverse[own.start :, own] = column.numpy()
