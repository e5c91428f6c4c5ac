"""When a model's drafts pay: their time against the calls they save, measured as it goes."""

from __future__ import annotations

import math

import numpy as np

from pipeline.runtime.drafting import best_draft_length
from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS

MOST_DRAFTED = STEADY_TOKENS - 1
# Until the draft's steps and the model's blocks have been timed.
_FIRST_DRAFT = 3
# Drafts before times are believed that speak against all drafting.
_ENOUGH = 4
# What was seen counts 0.95 times as much after every further draft: text changes its kind.
_MEMORY = 0.95
# Two right and one wrong to begin with.
_RIGHT, _WRONG = 2.0, 1.0
# Calls without drafts after which drafts that were wrong get another chance.
_PATIENCE = 32
# What the draft says of a guess counts as so many that were tried.
_TRUST = 4.0
# Then older ones count half.
_MOST_COUNTED = 256
# From here on ranks are counted together, and so are weights that are closer to 0 or 1.
_LAST_RANK, _LEAST_WEIGHT = 3, 1e-3
# A call without drafts reads two rows, so that its bits are those of any block.
STEADY_ROWS = 2


class DraftCosts:
    """How many tokens a model should draft, by its time, by the calls' time and by what was right.

    Args:
        calls: of the session that checks the drafts.
        steps: of the draft.
        row_cost: what one more token in a call costs, as a share of a call, until that is measured.

    Attributes:
        reason: why nothing is drafted; None while it pays.
    """

    def __init__(self, calls: CallTimes, steps: CallTimes, row_cost: float) -> None:
        self._calls, self._steps, self._row_cost = calls, steps, row_cost
        self._right, self._wrong = _RIGHT, _WRONG
        self._drafts = self._plain = 0
        self._never_pays = False
        self.reason: str | None = None

    def learn(self, right: int, drafted: int) -> None:
        """Count how many tokens of a draft were right; the first that was not ends it."""
        if drafted:
            self._forget()
            self._right += right
            self._wrong += right < drafted
            self._drafts += 1

    def length(self, most: int) -> int:
        """How many tokens to draft now, 0 to `most`."""
        costs_s = self._costs_s(min(most, MOST_DRAFTED))
        if costs_s is None:  # times come first: of a call without drafts, and then of a draft
            is_timed = self._calls.medians(STEADY_ROWS).get(STEADY_ROWS)
            return min(most, _FIRST_DRAFT) if is_timed else 0
        if self._never_pays or most < 1:
            return 0
        acceptance = self._right / (self._right + self._wrong)
        found = best_draft_length(acceptance, costs_s)
        if found or self._drafts < _ENOUGH:
            self.reason = None
            return found or min(most, 1)
        self._never_pays = best_draft_length(1.0, costs_s) == 0 and most >= _FIRST_DRAFT
        self.reason = self._explanation(costs_s, acceptance)
        self._plain += 1
        if self._plain % _PATIENCE == 0:
            self._forget()
            return min(most, 1)
        return 0

    def shares(self) -> tuple[float, float] | None:
        """Time of a step of the draft, and of another branch, as shares of a call's without one.

        By a line through the times of calls by their branches; None where nothing is timed.
        """
        calls, steps = self._calls.medians(MOST_DRAFTED + 1), self._steps.medians(1)
        if not calls or not steps:
            return None
        counts, times_s = np.array(list(calls), np.float64), np.array(list(calls.values()))
        branch_s = self._row_cost * times_s.mean()
        if len(counts) > 1:
            branch_s = max(0.0, float(np.polyfit(counts, times_s, 1)[0]))
        call_s = max(times_s.mean() - branch_s * (counts.mean() - STEADY_ROWS), times_s.min() / 2)
        return steps[1] / call_s, branch_s / call_s

    def _forget(self) -> None:
        """Move the counts towards those of the beginning."""
        self._right = _RIGHT + _MEMORY * (self._right - _RIGHT)
        self._wrong = _WRONG + _MEMORY * (self._wrong - _WRONG)

    def _costs_s(self, most: int) -> list[float] | None:
        """Seconds of a call with 0 to `most` draft tokens and of drafting them; None: not timed."""
        calls = self._calls.medians(MOST_DRAFTED + 1)
        step_s = self._steps.medians(1).get(1)
        if STEADY_ROWS not in calls or step_s is None:
            return None
        call_s, longest = calls[STEADY_ROWS], max(calls)
        row_s = self._row_cost * call_s
        if longest > STEADY_ROWS:
            row_s = max(0.0, calls[longest] - call_s) / (longest - STEADY_ROWS)
        rows = [max(STEADY_ROWS, 1 + drafted) for drafted in range(max(most, 0) + 1)]
        return [call_s + (n - STEADY_ROWS) * row_s + d * step_s for d, n in enumerate(rows)]

    def _explanation(self, costs_s: list[float], acceptance: float) -> str:
        call_ms, step_ms = costs_s[0] * 1e3, self._steps.medians(1)[1] * 1e3
        times = f"a call of the model takes {call_ms:.1f} ms, a step of the draft {step_ms:.1f} ms"
        if self._never_pays:
            return f"drafting is off: it cannot pay here, however many guesses are right ({times})"
        return f"drafting rests: {acceptance:.0%} of the guesses are right, and {times}"


class GuessOdds:
    """How often guesses are right, by their rank and by how sure the draft is: counted as it goes.

    Until there are counts, a guess is as likely as the draft has it.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], list[float]] = {}
        self._firsts = [_RIGHT, _RIGHT + _WRONG]

    @property
    def first(self) -> float:
        """How often the likeliest guess is right."""
        return self._firsts[0] / self._firsts[1]

    def of(self, rank: int, weight: float) -> float:
        """Probability that a guess is right if all before it are.

        Args:
            rank: 0 for the likeliest at its place.
            weight: what the draft has for it, 0 to 1.
        """
        right, tried = self._counts.get(_kind(rank, weight), (0.0, 0.0))
        return (right + _TRUST * weight) / (tried + _TRUST)

    def learn(self, rank: int, weight: float, is_right: bool) -> None:
        """Count a guess at a place that was reached."""
        found = [self._counts.setdefault(_kind(rank, weight), [0.0, 0.0])]
        for counts in [*found, self._firsts] if rank == 0 else found:
            counts[0] += is_right
            counts[1] += 1
            if counts[1] > _MOST_COUNTED:
                counts[:] = [count / 2 for count in counts]


def _kind(rank: int, weight: float) -> tuple[int, int]:
    """Guesses that are counted together: their log odds are about as high."""
    odds = max(weight, _LEAST_WEIGHT) / max(1.0 - weight, _LEAST_WEIGHT)
    return min(rank, _LAST_RANK), round(math.log(odds))
