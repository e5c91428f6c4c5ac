"""The memory that fitting a group takes, of its shapes: what is largest of the stages of a fit.

All is counted in float64 numbers, beside what the fit is given: with n columns, m rows of a stack,
h of its tallest member and rank r, k rows at a time,

- the target, where inputs have drifted: the root of the moment, n^2, and m n;
- throughout the stack of several members, in the weights' own type;
- a product of a tall stack, m > n, with the geometry, n^2: its gram matrix, 2 n^2 + k h + 3 k n;
  the eigenproblem, 7 n^2; the factors and their error, 2 n^2 + r (m + n) + 6 k n;
- of a wide one: the eigenproblem, m n + 7 m^2 + 2 k n; the pivots, r m + 5 r n + 3 k n;
- with the geometry, rounding one factor, or the dense matrix, of width w: a copy of the
  moment and its inverse, 2.5 w^2 (1.5 n^2 of the dense matrix, whose moment is the geometry); G of
  a member and a copy, 2 h^2, beside the inverse, w^2 / 2, codes and what they miss, and of a factor
  its values, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.compress.factorize.second_moments import ROWS_AT_ONCE
from pipeline.compress.plan.plan import GroupPlan

# Of libraries and of what is too small to count.
SMALL_BYTES = 1 << 27
# Codes and float32 numbers, in float64 numbers.
_CODE, _SINGLE = 1 / 8, 1 / 2


def fit_bytes(
    group: GroupPlan, heights: Sequence[int], *, itemsize: int = 4, drifted: bool = False
) -> int:
    """Memory that `fit_group` takes beside its arguments, about.

    Args:
        group: form, rank and formats.
        heights: m_i of its members.
        itemsize: bytes of a weight.
        drifted: whether its inputs are other than the original model's.
    """
    rows, columns = group.rows, group.columns
    stacked = rows * columns * itemsize / 8 if len(heights) > 1 else 0.0
    held = stacked + (rows * columns if drifted else 0)
    stages = [held]
    if drifted:
        stages.append(held + columns**2 + 3 * _some_rows(heights) * columns)
    if group.form != "dense":
        stages += [held + stage for stage in _of_product(group, heights)]
        held += group.rank * (rows + columns) + (2 * columns**2 if rows > columns else 0)
    if any(group.formats):
        stages += [held + columns**2 + stage for stage in _of_rounding(group, heights)]
    return int(8 * max(stages)) + SMALL_BYTES


def _of_product(group: GroupPlan, heights: Sequence[int]) -> list[float]:
    rows, columns, rank = group.rows, group.columns, group.rank
    some = _some_rows(heights)
    if rows <= columns:
        eigenproblem = rows * columns + 7 * rows**2 + 2 * some * columns
        return [eigenproblem, rank * (rows + 5 * columns) + 3 * some * columns]
    gram = 3 * columns**2 + some * (max(heights) + 3 * columns)
    factors = 3 * columns**2 + rank * (rows + columns) + 6 * some * columns
    return [gram, 8 * columns**2, factors]


def _of_rounding(group: GroupPlan, heights: Sequence[int]) -> list[float]:
    if group.form == "dense":
        moment, width = 1.5 * group.columns**2, group.columns
    else:
        width = group.rank
        moment = 2.5 * max(width, group.columns - width) ** 2
    values = _CODE + _SINGLE + (_SINGLE if group.form != "dense" else 0)
    own = _SINGLE * width**2 + values * group.rows * width
    return [moment, own + 2 * max(heights) ** 2]


def _some_rows(heights: Sequence[int]) -> int:
    return min(max(heights), ROWS_AT_ONCE)
