"""One answer in the making: logits in, text out, until it ends."""

from __future__ import annotations

import numpy as np

from pipeline.runtime.drafting import Lookup
from pipeline.runtime.sampling import choose_token
from pipeline.runtime.text_stream import Decoder, Detokenizer, StopStrings
from pipeline.serve.failure import internal
from pipeline.serve.job import Ending, Job


class Answering:
    """A job in a slot.

    Args:
        job: what is wanted.
        slot: where.
        room: most tokens of prompt and answer in the slot.
        decoder: turns tokens into text.
        stop_ids: tokens that end an answer.
        lookup: fresh, guesses tokens; None guesses none.

    Attributes:
        pending: tokens of the prompt that the slot does not hold yet.
        token: the last token chosen, which the slot does not hold yet.
        ending: how it ended; None while it goes on.
    """

    def __init__(
        self,
        job: Job,
        slot: int,
        room: int,
        decoder: Decoder,
        stop_ids: frozenset[int],
        lookup: Lookup | None = None,
    ) -> None:
        self.job, self.slot = job, slot
        self.pending = list(job.prompt_ids)
        self.token: int | None = None
        self.ending: Ending | None = None
        self._most_tokens = min(job.max_new_tokens, room + 1 - len(job.prompt_ids))
        self._stop_ids = stop_ids
        self._lookup = lookup
        self._drafted: list[int] = []
        self._cached = 0
        self._answer: list[int] = []
        self._detokenizer = Detokenizer(decoder)
        self._stops = StopStrings(job.stops)
        self._generator = np.random.default_rng(job.seed)

    def skip(self, cached: int) -> None:
        """Leave out the first tokens of the prompt, which the slot holds already."""
        self._cached = cached
        del self.pending[:cached]

    def take(self, logits: np.ndarray) -> None:
        """Choose the next token from float32 [V], and hand on the text that became certain.

        Raises:
            RequestFailure: the logits are not numbers.
        """
        require_numbers(logits)
        token = choose_token(logits, self.job.sampling, self._history(), self._generator)
        if token in self._stop_ids:
            self._end("stop")
            return
        self._answer.append(token)
        self.token = token
        self._emit(self._stops.push(self._detokenizer.push(token)))
        if self._stops.found is not None:
            self._end("stop")
        elif len(self._answer) == self._most_tokens:
            self._end("length")

    def draft(self) -> list[int]:
        """Guess what comes after `token`: no more than may be handed on, often nothing."""
        if self._lookup is None:
            return []
        known = len(self._lookup)
        self._lookup.learn(self._drafted, self._history()[known:])
        room = min(self._most_tokens - len(self._answer), self.job.outbox.room)
        self._drafted = self._lookup.draft(room - 1)
        return self._drafted

    def _end(self, reason: str) -> None:
        """Hand on what was held back, and the end."""
        if self._stops.found is None:
            self._emit(self._stops.push(self._detokenizer.finish()))
        if self._stops.found is None:
            self._emit(self._stops.finish())
        if self._stops.found is not None:  # it may have come with what was held back
            reason = "stop"
        self.ending = Ending(reason, len(self._answer), self._cached)
        self.job.outbox.put(self.ending)

    def _emit(self, text: str) -> None:
        """Put text into the outbox, unless there is none."""
        if text:
            self.job.outbox.put(text)

    def _history(self) -> list[int]:
        """Tokens of prompt and answer so far."""
        return self.job.prompt_ids + self._answer


def require_numbers(logits: np.ndarray) -> None:
    """Check float32 [V]: no NaN, and a largest entry that is finite.

    Raises:
        RequestFailure: 500, it is otherwise.
    """
    largest = float(logits.max())  # NaN if there is one anywhere
    if not np.isfinite(largest):
        raise internal("The model's logits are not finite numbers; nothing can be chosen.")
