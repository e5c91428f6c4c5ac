"""One answer in the making: logits in, token ids and text out, until it ends.

It knows no model and no request. Whoever has a model reads the prompt with it, hands over the
logits, and reads what the answer says next: `generate.py` for one sequence or a batch, the server's
scheduler for its slots.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.errors import InputError
from pipeline.runtime.draft_tree import child_of
from pipeline.runtime.drafting import Chooser, Drafter, GuessingDrafter
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.text_stream import Decoder, TextStream

# Logits, float32 [V] each, by their number.
Rows = Sequence[np.ndarray] | np.ndarray


class Constraint(Protocol):
    """Which tokens may come next; it goes along with one answer."""

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Logits, float32 [V], with -inf for tokens that may not come."""
        ...

    def take(self, token: int) -> None:
        """Go on behind a token."""
        ...


@dataclass(frozen=True)
class Decoding:
    """How an answer is made.

    Attributes:
        max_new_tokens: most tokens of it.
        sampling: how each is chosen.
        stop_ids: tokens that end it, and are not part of it.
        stops: texts that end it; nothing of one gets out.
        seed: of its own source of randomness; or that source, for several answers to share.

    Raises:
        InputError: stops or stop ids that are no collection of texts or of ids, or a limit that is
            no whole number.
    """

    max_new_tokens: int = 256
    sampling: Sampling = GREEDY
    stop_ids: Collection[int] = frozenset()
    stops: Sequence[str] = ()
    seed: int | Sequence[int] | np.random.Generator = 0

    def __post_init__(self) -> None:
        # A text is a sequence of texts, and of nothing else that is meant here.
        if isinstance(self.stops, str) or not all(isinstance(stop, str) for stop in self.stops):
            raise InputError(
                "The stop texts are no list of texts.",
                observed=repr(self.stops)[:80],
                expected='such as stops=("END",)',
            )
        _whole_numbers(self.stop_ids, "The stop ids are no token ids.")
        _whole_numbers([self.max_new_tokens], "The most new tokens are no whole number.")


def _whole_numbers(values: Any, what: str) -> list[int]:
    """The values as a list; raise InputError for text, bytes, and numbers that are not whole."""
    if not isinstance(values, str | bytes | bytearray | dict):
        with contextlib.suppress(TypeError):
            return [operator.index(value) for value in values]
    observed = f"a value of type {type(values).__name__}: {values!r}"[:80]
    raise InputError(what, observed=observed, expected="whole numbers")


class RunningAnswer:
    """The answer to one prompt.

    Args:
        prompt_ids: at least one token.
        decoding: how it is made.
        max_length: most tokens that the cache holds, prompt and answer together.
        decoder: turns tokens into text; None makes ids alone, which no text ends.
        drafter: fresh, proposes draft tokens; None proposes none.
        emit: gets the text piece by piece, as it becomes certain.
        watch: gets every token of the answer, before its text is emitted, and the logits that it
            was chosen from, float32 [V].
        constraint: fresh, says which tokens may come; None for all.

    Attributes:
        prompt_ids: as given.
        ids: tokens of the answer so far.
        token: the last of them, which the model is to read next; None before the first.
        text: what was emitted so far.
        ending: `stop` (a stop token or text), `length` (the limit asked for) or `context` (the
            cache is full); None while it goes on.

    Raises:
        InputError: the prompt is empty, or no sequence of token ids.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        decoding: Decoding,
        max_length: int,
        decoder: Decoder | None = None,
        drafter: Drafter | None = None,
        emit: Callable[[str], None] = lambda text: None,
        watch: Callable[[int, np.ndarray], None] | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.prompt_ids = _whole_numbers(prompt_ids, "The prompt is neither text nor token ids.")
        if not self.prompt_ids:
            raise InputError("The prompt is empty.", change="give at least one token")
        self.ids: list[int] = []
        self.token: int | None = None
        self.text = ""
        self.ending = None if decoding.max_new_tokens > 0 else "length"
        # The last token needs no place in the cache.
        self._most = min(decoding.max_new_tokens, max_length + 1 - len(prompt_ids))
        self._decoding, self._emit, self._watch = decoding, emit, watch
        self._constraint = constraint
        self._stream = None if decoder is None else TextStream(decoder, decoding.stops)
        self._generator = np.random.default_rng(decoding.seed)
        self._history = self.prompt_ids.copy()
        self._drafted: Sequence[int] = ()
        self._learnt = 0  # tokens of the history that the drafter knows
        self._drafter: Drafter | None = None
        if drafter is not None:
            self.draft_by(drafter)

    def draft_by(self, drafter: Drafter) -> None:
        """Let a fresh drafter propose the tokens of this answer, which has none so far."""
        self._drafter = drafter
        if isinstance(drafter, GuessingDrafter):
            drafter.guess_by(self._chooser)

    def take(self, rows: Rows, drafted: Sequence[int] = ()) -> list[int]:
        """Go on by the tokens that a call of the model gives.

        Args:
            rows: float32 [V] each: logits of the last token that was read, and of every draft token
                behind it.
            drafted: the draft tokens; each is accepted where it is what the answer chooses.

        Returns:
            Numbers of the draft tokens that the answer accepts and goes on from, one behind
            another; the others were read in vain.
        """
        accepted: list[int] = []
        found: int | None = -1
        while found is not None:
            self._choose(rows[found + 1])
            if self.ending is not None:
                break
            if (found := child_of(drafted, found, self.token)) is not None:
                accepted.append(found)
        return accepted

    def draft(self, room: int | None = None) -> Sequence[int]:
        """Propose what comes after `token`, often nothing.

        Args:
            room: most tokens that may be chosen in the next call; None leaves it to the limits.
        """
        if self._drafter is None:
            return ()
        self._tell(self._drafter)
        left = self._most - len(self.ids)
        self._drafted = self._drafter.draft((left if room is None else min(left, room)) - 1)
        return self._drafted

    def _choose(self, logits: np.ndarray) -> None:
        """Choose one token, and hand on the text that became certain."""
        how = self._decoding
        allowed = logits if self._constraint is None else self._constraint.mask(logits)
        token = how.sampling.choose(allowed, self._history, self._generator)
        if token in how.stop_ids:
            self._end("stop")
            return
        if self._constraint is not None:
            self._constraint.take(token)
        self.token = token
        self.ids.append(token)
        self._history.append(token)
        if self._watch is not None:
            self._watch(token, logits)
        if self._stream is not None:
            self._hand_on(self._stream.push(token))
        if self._stream is not None and self._stream.has_stopped:
            self._end("stop")
        elif len(self.ids) == how.max_new_tokens:
            self._end("length")
        elif len(self.ids) == self._most:
            self._end("context")

    def _chooser(self) -> Chooser:
        """Chooses what would come next by given logits, and leaves the answer as it is."""
        how, generator = self._decoding, copy.deepcopy(self._generator)
        return Chooser(how.sampling, self._history, generator, how.stop_ids)

    def _end(self, reason: str) -> None:
        """Hand on the text that was held back, and say why it ended."""
        if self._stream is not None:
            self._hand_on(self._stream.finish())
            reason = "stop" if self._stream.has_stopped else reason  # in what was held back
        if self._drafter is not None:
            self._tell(self._drafter)
        self.ending = reason

    def _tell(self, drafter: Drafter) -> None:
        """Let the drafter know what was chosen since it was last asked."""
        drafter.learn(self._drafted, self._history[self._learnt :])
        self._drafted, self._learnt = (), len(self._history)

    def _hand_on(self, text: str) -> None:
        if text:
            self.text += text
            self._emit(text)
