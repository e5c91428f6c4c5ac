"""Log probabilities of the tokens of an answer, beside the text that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipeline.runtime.text_stream import Decoder

# What OpenAI's interface writes for a token that cannot come: JSON has no infinity.
_LEAST = -9999.0


@dataclass(frozen=True)
class TokenScore:
    """A token that was chosen.

    Attributes:
        text: of the token alone.
        log_prob: natural logarithm of its probability, as the model has it: before temperature,
            penalties and filters.
        likeliest: texts and log probabilities of the likeliest tokens, best first.
    """

    text: str
    log_prob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ScoredText:
    """A piece of text, and the tokens that were chosen since the piece before it."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)


class Scorer:
    """Gathers the log probabilities of tokens until their text is certain.

    Args:
        put: takes the pieces.
        decoder: makes text of tokens; used in the thread that calls.
        alternatives: how many of the likeliest tokens go with each.
    """

    def __init__(
        self, put: Callable[[ScoredText], None], decoder: Decoder, alternatives: int
    ) -> None:
        self._put, self._decoder, self._alternatives = put, decoder, alternatives
        self._scores: list[TokenScore] = []

    def watch(self, token: int, logits: np.ndarray) -> None:
        """Take a token, and the logits that it was chosen from, float32 [V]."""
        log_probs = _log_softmax(logits)
        best = _largest(logits, self._alternatives)
        likeliest = tuple((self._text(int(i)), _finite(log_probs[i])) for i in best)
        self._scores.append(TokenScore(self._text(token), _finite(log_probs[token]), likeliest))

    def emit(self, text: str) -> None:
        """Send a text, and the tokens up to it."""
        scores, self._scores = self._scores, []
        self._put(ScoredText(text, scores))

    def finish(self) -> None:
        """Send tokens that no text came of."""
        if self._scores:
            self.emit("")

    def _text(self, token: int) -> str:
        """Text of a token as it stands behind another: the first loses a blank before it."""
        one = self._decoder.decode([token], skip_special_tokens=False)
        return self._decoder.decode([token, token], skip_special_tokens=False)[len(one) :]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities, float64 [V], of float [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest of float [V], largest first; the first of equals first."""
    count = min(count, logits.size)
    if not count:
        return np.empty(0, np.int64)
    threshold = np.partition(logits, -count)[-count]
    candidates = np.flatnonzero(logits >= threshold)
    return candidates[np.argsort(-logits[candidates], kind="stable")][:count]


def _finite(log_prob: float) -> float:
    return max(_LEAST, float(log_prob))
