"""Answers in a form that was asked for: JSON of a schema, by masking tokens that would leave it."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.serve.failure import RequestFailure
from pipeline.serve.worker import Worker

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

_LONGEST_REASON = 500
_LONGEST_SCHEMA = 1 << 18


class _Grammar:
    """Which tokens may come next in one answer.

    Args:
        matcher: of this answer alone.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Logits, float32 [V], with -inf for what may not come.

        Raises:
            RequestFailure: 500, the form became too large to be followed.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_working()
        allowed = np.unpackbits(bits, bitorder="little")[: logits.size].astype(bool)
        masked = np.full_like(logits, -np.inf)
        masked[: allowed.size][allowed] = logits[: allowed.size][allowed]
        if not np.isfinite(float(masked.max())):
            raise RequestFailure.internal("No token of the model goes on in the form asked for.")
        return masked

    def take(self, token: int) -> None:
        """Go on behind a token that was chosen."""
        self._matcher.consume_token(token)
        self._require_working()

    def copy(self) -> _Grammar:
        """The same state, for another answer."""
        return _Grammar(self._matcher.deep_copy())

    def _require_working(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error()[:_LONGEST_REASON]
            raise RequestFailure.internal(f"The form of the answer cannot be followed: {reason}")


class GrammarMaker:
    """Makes grammars of schemas over the vocabulary of one model.

    Args:
        backend: a `tokenizers.Tokenizer`; without one there are no grammars.
        vocab_size: width of the logits.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, backend: Any, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._backend, self._vocab_size, self._stop_ids = backend, vocab_size, stop_ids
        self._worker = Worker("grammars")
        self._vocabulary: LLTokenizer | None = None

    async def make(self, schema: dict[str, Any] | None) -> _Grammar | None:
        """A grammar at its beginning, made off the event loop; None for no schema.

        Raises:
            RequestFailure: 400, the schema is none, or holds what cannot be followed; or the
                package is missing, or the model's tokenizer is not of the kind that it takes.
        """
        if schema is None:
            return None
        return await self._worker.run(lambda: self._make(schema))

    def close(self) -> None:
        """Let the thread end."""
        self._worker.close()

    def _make(self, schema: dict[str, Any]) -> _Grammar:
        if importlib.util.find_spec("llguidance") is None or self._backend is None:
            raise _refused("This server cannot hold answers to a form; llguidance is missing.")
        if not self._stop_ids:
            raise _refused("This model has no token that would end an answer of a form.")
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > _LONGEST_SCHEMA:
            raise _refused(f"The schema is longer than {_LONGEST_SCHEMA} characters.")
        try:
            # What strings may hold is up to the model, blanks between the parts are not.
            overrides: JsonCompileOptions = {"whitespace_flexible": False}
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=overrides)
            matcher = LLMatcher(self._known_vocabulary(), grammar, log_level=0)
        except BaseException as error:  # the library's panics are no Exceptions
            raise _unfit(str(error)) from error
        if matcher.is_error():
            raise _unfit(matcher.get_error())
        return _Grammar(matcher)

    def _known_vocabulary(self) -> LLTokenizer:
        """The library's view of the vocabulary, made when it is first asked for."""
        from llguidance import LLTokenizer

        if self._vocabulary is None:
            self._vocabulary = LLTokenizer(
                self._backend.to_str(), self._vocab_size, sorted(self._stop_ids)
            )
        return self._vocabulary


def _unfit(reason: str) -> RequestFailure:
    return _refused(f"The schema cannot be followed: {reason[:_LONGEST_REASON]}")


def _refused(message: str) -> RequestFailure:
    return RequestFailure(400, message, param="response_format", code="unsupported_parameter")
