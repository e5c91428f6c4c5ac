"""How many numbers a factorisation stores, and the rank that a kept fraction allows."""

from __future__ import annotations

import math
from typing import Literal

Form = Literal["dense", "low_rank", "skip"]


def stored_parameters(form: Form, rows: int, columns: int, rank: int) -> int:
    """Numbers stored for a matrix of `rows` x `columns` (m x n).

    dense: m n. low_rank, W = B A: r (m + n). skip, W = B' [I A'] P: r (m + n - r); the
    permutation P is n small integers and is not counted, as in the literature.

    Raises:
        ValueError: rank outside [0, n].
    """
    if not 0 <= rank <= columns:
        raise ValueError(f"rank {rank} is outside [0, {columns}]")
    if form == "dense":
        return rows * columns
    if form == "low_rank":
        return rank * (rows + columns)
    return rank * (rows + columns - rank)


def rank_for_kept(form: Form, rows: int, columns: int, kept: float, multiple: int = 1) -> int:
    """Largest rank whose parameters are at most `kept` of the dense ones.

    low_rank: r = kept m n / (m + n). skip: the smaller root of r (m + n - r) = kept m n,
    r = ((m + n) - sqrt((m + n)^2 - 4 kept m n)) / 2.

    Args:
        form: what will be stored.
        rows: m, the height of the (stacked) matrix.
        columns: n, its width.
        kept: fraction of m n to keep, in (0, 1].
        multiple: the rank is rounded down to a multiple of this.

    Raises:
        ValueError: `kept` outside (0, 1], or `form` is dense.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept fraction {kept} is outside (0, 1]")
    dense = rows * columns
    total = rows + columns
    if form == "low_rank":
        rank = math.floor(kept * dense / total)
    elif form == "skip":
        rank = math.floor((total - math.sqrt(total * total - 4 * kept * dense)) / 2)
    else:
        raise ValueError("a dense matrix has no rank to choose")
    return min(rank, rows, columns) // multiple * multiple


def reason_to_stay_dense(form: Form, rows: int, columns: int, rank: int) -> str | None:
    """Why a factorisation of this rank would not pay; None when it does."""
    if rank < 1:
        return f"the budget allows rank {rank}: nothing would be left of the matrix"
    if rank >= min(rows, columns):
        return f"rank {rank} is the full rank of {rows} x {columns}"
    stored = stored_parameters(form, rows, columns, rank)
    if stored >= rows * columns:
        return f"rank {rank} would store {stored} numbers, the matrix itself {rows * columns}"
    return None
