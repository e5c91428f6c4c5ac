"""One choice for each group under one budget: the multiple-choice knapsack.

min sum_i loss_i[c_i] subject to sum_i size_i[c_i] <= budget. Block skipping stores r (m + n - r)
numbers, concave in r: the marginal size of a rank falls as r grows, so the rule of equal slopes
may stop anywhere. The integer program does not care, and equal slopes say which candidates it need
not look at: with a price p for each unit of size,

    sum_i min_c (loss_i[c] + p size_i[c]) - p budget

is no more than what any choice loses, and by as much as a candidate lies above its group's least,
so does every choice that has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

_RELATIVE_GAP = 1e-4
_TIME_LIMIT_S = 60.0
_BISECTIONS, _LEAST_PRICE = 60, 1e-30


def undominated(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the candidates that no other beats in both size and loss, by rising size."""
    order = np.lexsort((losses, sizes))
    best = np.minimum.accumulate(losses[order])
    improves = np.r_[True, best[1:] < best[:-1]]
    return order[improves]


def allocate(
    sizes: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    budget: int,
    stopped: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """Choose one candidate for each group, losing least within the budget.

    Args:
        sizes: for each group, the size of each of its candidates, int [K_i].
        losses: what each candidate loses, float [K_i].
        budget: largest sum of sizes.
        stopped: told where the solver finds no proof in TIME_LIMIT_S, and what that may cost.

    Returns:
        The index of the choice of each group; within RELATIVE_GAP of the least loss, or as near to
        it as equal slopes come.

    Raises:
        ValueError: not even the smallest candidates fit; says how large they are.
    """
    smallest = sum(int(s.min()) for s in sizes)
    if smallest > budget:
        raise ValueError(f"the smallest choices need {smallest} of {budget}")
    fronts = [undominated(s, e) for s, e in zip(sizes, losses, strict=True)]
    front_sizes = [s[front].astype(float) for s, front in zip(sizes, fronts, strict=True)]
    front_losses = [e[front].astype(float) for e, front in zip(losses, fronts, strict=True)]
    by_slopes, price = _equal_slopes(front_sizes, front_losses, budget)
    _use_slack_(by_slopes, front_sizes, front_losses, budget)
    costs = _costs(front_sizes, front_losses, price)
    least = sum(float(c.min()) for c in costs) - price * budget  # what every choice loses
    places = _worth_trying(costs, _total(front_losses, by_slopes) - least)
    few_sizes, few_losses = _among(places, front_sizes, front_losses)
    found, is_proven = _solve(few_sizes, few_losses, budget)
    tried = [by_slopes]
    if found is not None:
        by_solver = [int(among[c]) for among, c in zip(places, found, strict=True)]
        _repair_excess_(by_solver, front_sizes, front_losses, budget)
        _use_slack_(by_solver, front_sizes, front_losses, budget)
        tried.insert(0, by_solver)
    # The first where they lose alike.
    chosen = min(tried, key=lambda places: _total(front_losses, places))
    if not is_proven:
        share = 1 - least / (_total(front_losses, chosen) or 1.0)
        stopped(f"the search was stopped after {_TIME_LIMIT_S:.0f} s; what it has found is within "
                f"{max(share, 0.0):.1%} of the least loss")  # fmt: skip
    return [int(front[c]) for front, c in zip(fronts, chosen, strict=True)]


def _costs(
    sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray], price: float
) -> list[np.ndarray]:
    """What each candidate loses and pays, at a price of a unit of size."""
    return [e + price * s for s, e in zip(sizes, losses, strict=True)]


def _worth_trying(costs: list[np.ndarray], gap: float) -> list[np.ndarray]:
    """Of each group, the places of candidates that a choice no worse than the known one may have.

    Args:
        costs: of each candidate, at one price.
        gap: loss of the known choice beyond what every choice loses.
    """
    # Sums of float64 are not exact; a candidate more does no harm.
    margin = gap + 1e-9 * sum(float(np.abs(c).min()) for c in costs)
    return [np.flatnonzero(c - c.min() <= margin) for c in costs]


def _among(places: list[np.ndarray], *arrays: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Of several arrays for each group, what stands at some places."""
    return [[a[p] for a, p in zip(of, places, strict=True)] for of in arrays]


def _solve(
    sizes: list[np.ndarray], losses: list[np.ndarray], budget: int
) -> tuple[list[int] | None, bool]:
    """The integer program, by HiGHS, both sides scaled to order one; and whether it is proven."""
    counts = [len(s) for s in sizes]
    starts = np.cumsum([0, *counts[:-1]])
    groups = np.repeat(np.arange(len(counts)), counts)
    columns = np.arange(groups.size)
    one_each = coo_array((np.ones(groups.size), (groups, columns)))
    total = np.concatenate(sizes)[None] / budget
    objective = np.concatenate(losses)
    scale = max(sum(float(e.min()) for e in losses), float(objective.max()) * 1e-6, 1e-300)
    with _silent_stdout():
        result = milp(
            objective / scale,
            integrality=np.ones(groups.size),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(total, ub=1)],
            options={"mip_rel_gap": _RELATIVE_GAP, "time_limit": _TIME_LIMIT_S},
        )
    if result.x is None:
        return None, False
    ends = starts + counts
    chosen = [int(result.x[a:b].argmax()) for a, b in zip(starts, ends, strict=True)]
    return chosen, bool(result.success)


def _total(values: Sequence[np.ndarray], chosen: Sequence[int]) -> float:
    """Sum of the chosen values of all groups."""
    return float(sum(v[c] for v, c in zip(values, chosen, strict=True)))


def _equal_slopes(
    sizes: list[np.ndarray], losses: list[np.ndarray], budget: int
) -> tuple[list[int], float]:
    """What is best for the lowest price of a unit of size at which all fits, and that price.

    No more than one step of one group is lost against the best of all. It is what is left where the
    solver is stopped by its time limit, with whatever it has found by then.
    """

    def at(price: float) -> list[int]:
        return [int(c.argmin()) for c in _costs(sizes, losses, price)]

    # Sizes are whole numbers: at the highest price every group takes its smallest.
    high = max(float(e.max()) for e in losses) + _LEAST_PRICE
    low = _LEAST_PRICE
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if _total(sizes, at(middle)) > budget:
            low = middle
        else:
            high = middle
    return at(high), high


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """Drop what the solver's C++ prints to stdout when it repairs a choice: results go there."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _repair_excess_(
    chosen: list[int], sizes: list[np.ndarray], losses: list[np.ndarray], budget: int
) -> None:
    """Step down where it loses least, while the budget is exceeded; changes `chosen`.

    The solver allows itself an excess of 1e-6 of the budget, which may be hundreds of numbers.
    """
    while sum(s[c] for s, c in zip(sizes, chosen, strict=True)) > budget:
        steps = [(losses[g][c - 1] - losses[g][c], g) for g, c in enumerate(chosen) if c > 0]
        chosen[min(steps)[1]] -= 1


def _use_slack_(
    chosen: list[int], sizes: list[np.ndarray], losses: list[np.ndarray], budget: int
) -> None:
    """Take the best step that still fits, until none does; changes `chosen`."""
    left = budget - sum(s[c] for s, c in zip(sizes, chosen, strict=True))
    while True:
        gains = []
        for group, c in enumerate(chosen):
            fits = np.flatnonzero(sizes[group][c + 1 :] - sizes[group][c] <= left)
            if fits.size:
                better = c + 1 + int(fits[-1])
                gains.append((losses[group][c] - losses[group][better], group, better))
        if not gains:
            return
        _, group, better = max(gains)
        left -= sizes[group][better] - sizes[group][chosen[group]]
        chosen[group] = better
