"""Drafts of the next tokens, looked up in what was read and written so far: no model, only ids.

What follows the last few tokens is guessed to be what followed them when they last occurred (prompt
lookup, Saxena 2023; LLMA, Yang et al. 2023). The model then reads the guesses in the same call as
its last token, and every guess is kept only where the model would have chosen it. Nothing here
decides what is said; it decides how many tokens one call may give.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.runtime.prefix_cache import common_length

# So many of the last tokens have to agree. One alone agrees too often to mean anything.
SHORTEST, LONGEST = 2, 4
MOST_DRAFTED = 12
# What was seen counts 0.9 times as much after every further draft: text changes its kind.
MEMORY = 0.9


class Lookup:
    """Guesses for one sequence, as many as pay.

    How often guesses are right is counted for each length of agreement, beginning with one right
    and one wrong.

    Args:
        row_cost: what one more token in a call costs, as a share of a call of one token.

    Attributes:
        drafted: tokens guessed so far.
        taken: how many of them were right.
    """

    def __init__(self, row_cost: float) -> None:
        self.row_cost = row_cost
        self.drafted = self.taken = 0
        self._ids: list[int] = []
        # The last n tokens -> where what followed them stands.
        self._next: dict[tuple[int, ...], int] = {}
        self._right = dict.fromkeys(range(SHORTEST, LONGEST + 1), 1.0)
        self._wrong = dict.fromkeys(range(SHORTEST, LONGEST + 1), 1.0)
        self._agreeing = SHORTEST

    def __len__(self) -> int:
        """Tokens that were appended."""
        return len(self._ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Append tokens of the prompt."""
        for token in ids:
            end = len(self._ids)
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                self._next[tuple(self._ids[end - n :])] = end
            self._ids.append(token)

    def draft(self, most: int) -> list[int]:
        """Guess what comes next: up to `most` tokens, often none."""
        ids, end = self._ids, len(self._ids)
        for n in range(min(LONGEST, end), SHORTEST - 1, -1):
            start = self._next.get(tuple(ids[end - n :]))
            if start is not None:
                acceptance = self._right[n] / (self._right[n] + self._wrong[n])
                count = best_draft_length(acceptance, self.row_cost, min(most, MOST_DRAFTED))
                self._agreeing = n
                # Where the end is reached, the guess goes on from itself: what repeats is a loop.
                period = end - start
                self._forget(n)
                self.drafted += count
                return [ids[start + i % period] for i in range(count)]
        return []

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        """Append tokens that were chosen, and count how many of the last draft were among them."""
        right = common_length(drafted, chosen)
        self.taken += right
        self._right[self._agreeing] += right
        self._wrong[self._agreeing] += right < len(drafted)
        self.extend(chosen)

    def _forget(self, n: int) -> None:
        """Move the counts towards one and one, so that a length that failed is tried again."""
        self._right[n] = 1.0 + MEMORY * (self._right[n] - 1.0)
        self._wrong[n] = 1.0 + MEMORY * (self._wrong[n] - 1.0)


def best_draft_length(acceptance: float, row_cost: float, most: int) -> int:
    """How many guesses give the most tokens for the time.

    With d guesses, each right with probability p as long as those before it are, a call gives
    1 + p + ... + p^d tokens and costs 1 + d c.

    Args:
        acceptance: p, 0 to 1.
        row_cost: c, above 0.
        most: upper limit.

    Returns:
        0 to `most`; 0 unless p > c.
    """
    tokens, best_rate, best = 1.0, 1.0, 0
    for count in range(1, most + 1):
        tokens += acceptance**count
        rate = tokens / (1.0 + count * row_cost)
        if rate > best_rate:
            best_rate, best = rate, count
    return best
