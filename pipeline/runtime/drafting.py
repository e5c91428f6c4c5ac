"""Speculative decoding: draft tokens that the model checks several of in one call.

The model reads draft tokens beside its last token, and each is kept only where the model would have
chosen it. A drafter decides not what is said, but how many tokens one call may give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.errors import UsageError
from pipeline.runtime.prefix_cache import common_length
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sessions.session import Session, SlotSession

# Prompt lookup: so many of the last tokens have to agree. One alone agrees too often to mean
# anything.
_SHORTEST, _LONGEST = 2, 4
_MOST_DRAFTED = 12
# What was seen counts 0.9 times as much after every further draft: text changes its kind.
_MEMORY = 0.9


class Drafter(Protocol):
    """Proposes the next tokens of one answer.

    Attributes:
        drafted: draft tokens proposed so far.
        taken: how many of them were accepted.
    """

    drafted: int
    taken: int

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        """Hear what came after all that was heard so far, the prompt first.

        Args:
            drafted: what was last proposed for that place; empty where nothing was.
            chosen: the tokens that came.
        """

    def draft(self, most: int) -> Sequence[int]:
        """Propose what comes next: up to `most` tokens one behind another, as many as pay.

        Often none. They are a chain, or branch, as a `Draft`.
        """
        ...


class Chooser:
    """Chooses what would come at a place of an answer as the answer would, and leaves it as it is.

    What a constraint or a stop text forbids may be among it: these are guesses.

    Args:
        how: the answer's settings.
        history: tokens so far, for the repetition penalty.
        generator: its noise, which is not touched without a temperature; it is this object's own.
        stop_ids: tokens that end the answer.
    """

    def __init__(
        self,
        how: Sampling = GREEDY,
        history: Sequence[int] = (),
        generator: np.random.Generator | None = None,
        stop_ids: Collection[int] = (),
    ) -> None:
        self._how, self._history, self._stop_ids = how, list(history), stop_ids
        self._generator = np.random.default_rng(0) if generator is None else generator

    def __call__(self, logits: np.ndarray) -> int | None:
        """Choose by logits, float32 [V], and go on behind it; None where it ends the answer."""
        token = self._how.choose(logits, self._history, self._generator)
        self._history.append(token)
        return None if token in self._stop_ids else token

    def rank(self, logits: np.ndarray, count: int) -> list[tuple[int, float]]:
        """What is chosen by logits, float32 [V], and what by others that are close to them.

        Call it once, and go on by `behind`.

        Returns:
            Up to `count` tokens, the one that is chosen first, and what speaks for each, 0 to 1;
            without those that end the answer.
        """
        found = self._how.rank(logits, self._history, self._generator, count)
        return [(token, weight) for token, weight in found if token not in self._stop_ids]

    def behind(self, token: int) -> Chooser:
        """Chooses at the next place, behind a token."""
        is_drawn = self._how.temperature != 0
        generator = copy.deepcopy(self._generator) if is_drawn else self._generator
        return Chooser(self._how, [*self._history, token], generator, self._stop_ids)


@runtime_checkable
class GuessingDrafter(Drafter, Protocol):
    """A drafter that has logits of its own."""

    def guess_by(self, begin: Callable[[], Chooser]) -> None:
        """Hear how the answer chooses.

        Args:
            begin: gives what chooses the tokens to come as the answer will, by the same settings
                and the same noise: where the logits are the model's, the guesses are its tokens.
        """


@runtime_checkable
class DraftSource(Protocol):
    """What has a drafter for each answer, such as a model that was opened beside the session."""

    def begin(self, slot: int) -> Drafter:
        """A fresh drafter, for an answer in a slot of the session."""
        ...

    def take_notice(self) -> str | None:
        """What the user should know of the drafts, once; None where there is nothing new."""
        ...


class PromptLookup:
    """Prompt-lookup decoding: draft tokens out of what was read and written so far, by ids alone.

    What follows the last few tokens is proposed to be what followed them when they last occurred
    (prompt lookup, Saxena 2023; LLMA, Yang et al. 2023). How often that is right is counted for
    each length of agreement, beginning with one right and one wrong.

    Args:
        row_cost: what one more token in a call costs, as a share of a call of one token.
        rows: that are computed in any call, so that as many tokens of it cost nothing.

    Attributes:
        drafted: draft tokens proposed so far.
        taken: how many of them were accepted.
    """

    def __init__(self, row_cost: float, rows: int = 1) -> None:
        self.row_cost, self._rows = row_cost, rows
        self.drafted = self.taken = 0
        self._ids: list[int] = []
        # The last n tokens -> where what followed them stands.
        self._next: dict[tuple[int, ...], int] = {}
        self._right = dict.fromkeys(range(_SHORTEST, _LONGEST + 1), 1.0)
        self._wrong = dict.fromkeys(range(_SHORTEST, _LONGEST + 1), 1.0)
        self._agreeing = _SHORTEST

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        right = common_length(drafted, chosen)
        self.taken += right
        self._right[self._agreeing] += right
        self._wrong[self._agreeing] += right < len(drafted)
        for token in chosen:
            end = len(self._ids)
            for n in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._next[tuple(self._ids[end - n :])] = end
            self._ids.append(token)

    def draft(self, most: int) -> list[int]:
        ids, end = self._ids, len(self._ids)
        for n in range(min(_LONGEST, end), _SHORTEST - 1, -1):
            start = self._next.get(tuple(ids[end - n :]))
            if start is not None:
                acceptance = self._right[n] / (self._right[n] + self._wrong[n])
                longest = min(most, _MOST_DRAFTED)
                count = _best_draft_length(acceptance, self.row_cost, longest, self._rows)
                self._agreeing = n
                # Where the end is reached, the draft goes on from itself: what repeats is a loop.
                period = end - start
                self._forget(n)
                self.drafted += count
                return [ids[start + i % period] for i in range(count)]
        return []

    def _forget(self, n: int) -> None:
        """Move the counts towards one and one, so that a length that failed is tried again."""
        self._right[n] = 1.0 + _MEMORY * (self._right[n] - 1.0)
        self._wrong[n] = 1.0 + _MEMORY * (self._wrong[n] - 1.0)


class FirstOf:
    """Drafters in turn: the first that proposes anything is asked.

    Args:
        drafters: fresh; those that cost less come first.

    Attributes:
        drafted: draft tokens proposed so far.
        taken: how many of them were accepted.
    """

    def __init__(self, *drafters: Drafter) -> None:
        self.drafted = self.taken = 0
        self._drafters = drafters
        self._asked: Drafter | None = None

    def guess_by(self, begin: Callable[[], Chooser]) -> None:
        for drafter in self._drafters:
            if isinstance(drafter, GuessingDrafter):
                drafter.guess_by(begin)

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        for drafter in self._drafters:
            drafter.learn(drafted if drafter is self._asked else (), chosen)
        self.taken = sum(drafter.taken for drafter in self._drafters)

    def draft(self, most: int) -> Sequence[int]:
        found: Sequence[int] = ()
        for drafter in self._drafters:
            self._asked = drafter
            if found := drafter.draft(most):
                break
        self.drafted += len(found)
        return found


def best_draft_length(acceptance: float, costs: Sequence[float]) -> int:
    """How many draft tokens give the most tokens for the time.

    With d draft tokens, each right with probability p as long as those before it are, a call gives
    1 + p + ... + p^d tokens.

    Args:
        acceptance: p, 0 to 1.
        costs: time of a call, and of drafting for it, with 0, 1, 2 ... draft tokens; in any unit.

    Returns:
        0 to `len(costs) - 1`.
    """
    tokens, best_rate, best = 1.0, 1.0 / costs[0], 0
    for count, cost in enumerate(costs[1:], 1):
        tokens += acceptance**count
        if tokens / cost > best_rate:
            best_rate, best = tokens / cost, count
    return best


def _best_draft_length(acceptance: float, row_cost: float, most: int, rows: int = 1) -> int:
    """`best_draft_length` where a call costs 1 + d c, of which `rows` - 1 are free: else p > c."""
    costs = [1.0 + max(0, d + 1 - rows) * row_cost for d in range(max(most, 0) + 1)]
    return best_draft_length(acceptance, costs)


def _by_prompt_lookup(session: Session | SlotSession) -> Drafter | None:
    return None if session.row_cost is None else PromptLookup(session.row_cost)


PROMPT_LOOKUP = "prompt-lookup"
_DRAFTERS: dict[str, Callable[[Session | SlotSession], Drafter | None]] = {
    PROMPT_LOOKUP: _by_prompt_lookup
}


def make_drafter(
    session: Session | SlotSession, kind: str | DraftSource | None, slot: int = 0
) -> Drafter | None:
    """What drafts for one answer of a session; None where it would save nothing.

    Args:
        session: which checks the drafts.
        kind: a name of `_DRAFTERS`, or what was opened beside the session; None for no drafts.
        slot: of the answer.

    Raises:
        UsageError: there is no drafter of that name.
    """
    if kind is None:
        return None
    if not isinstance(kind, str):
        return kind.begin(slot)
    if kind not in _DRAFTERS:
        raise UsageError("Unknown drafter.", observed=kind, expected=", ".join(_DRAFTERS))
    return _DRAFTERS[kind](session)
