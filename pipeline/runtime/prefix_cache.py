"""What stands in a session's cache, so that a prompt reads only what is new."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.runtime.sessions.session import BlockSession, RewindingSession, Session


class Transcript:
    """A session of one sequence, and the tokens it has read.

    Args:
        session: used by nothing else; a new prompt starts from nothing where it cannot rewind.

    Attributes:
        max_length: most tokens of the cache.
        row_cost: the session's, None where it has none.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.max_length = session.max_length
        self.row_cost = session.row_cost if isinstance(session, BlockSession) else None
        self._ids: list[int] = []
        session.reset()

    def begin(self, prompt_ids: Sequence[int]) -> list[int]:
        """Keep what the cache and a prompt have in common; return the rest, at least one token.

        It is two where the prompt has as many: one token alone is summed in another order than
        several are, and the same prompt should give the same answer twice.
        """
        shared = common_length(self._ids, prompt_ids[:-2])
        if shared and isinstance(self.session, RewindingSession):
            self.session.rewind(shared)
            shared = self.session.length
        else:
            self.session.reset()
            shared = 0
        self._ids = list(prompt_ids[:shared])
        return list(prompt_ids[shared:])

    def read(self, new_ids: Sequence[int], drafted: Sequence[int] = ()) -> np.ndarray:
        """Append tokens, and guesses behind them.

        Args:
            new_ids: at least one token.
            drafted: what may come next.

        Returns:
            float32 [1 + len(drafted), V], the logits of the last token and of every guess.

        Raises:
            InputError: more tokens than the cache holds, or ids outside the vocabulary.
        """
        known = self._ids
        self._ids = []  # whatever is in the cache after a failure is not to be built on
        block = np.array([[*new_ids, *drafted]], dtype=np.int64)
        logits = self.session.forward(block, last_only=not drafted)[0, -1 - len(drafted) :]
        self._ids = [*known, *new_ids, *drafted]
        return logits

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens: the guesses that were wrong.

        Raises:
            RuntimeError: the session cannot.
        """
        if length == len(self._ids):
            return
        known, self._ids = self._ids, []
        if isinstance(self.session, RewindingSession):
            self.session.rewind(length)
            if self.session.length == length:
                self._ids = known[:length]
                return
        raise RuntimeError(f"{self.session.name} cannot go back to {length} tokens")


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    shorter = min(len(first), len(second))
    if list(first[:shorter]) == list(second[:shorter]):
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
