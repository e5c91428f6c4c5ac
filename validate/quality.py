"""How well a session predicts a text: alone, or beside a reference session on the same text.

Session and reference run side by side, so that no logits need be kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.runtime.sessions.session import Session
from validate.metrics import kl_per_token, nll_per_token, perplexity_with_error

CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Perplexity:
    """How surprised a stage is by a text.

    Attributes:
        value: exp of the mean negative log-likelihood per predicted token.
        standard_error: by the delta method, windows as the independent units; None for one window.
        tokens: predicted tokens, all windows together.
        window_nlls: mean negative log-likelihood of each window, nats.
    """

    value: float
    standard_error: float | None
    tokens: int
    window_nlls: list[float]


def measure_perplexity(session: Session, windows: np.ndarray) -> Perplexity:
    """Perplexity over windows that each start on an empty cache.

    Args:
        session: any backend with room for a window.
        windows: int64 [W, L]; the first token of a window is given, the other L - 1 predicted.

    Raises:
        InputError: a window is longer than the session's cache.
    """
    window_nlls = np.array([_window_nll(session, window) for window in windows])
    value, error = perplexity_with_error(window_nlls)
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(value, error, predicted, window_nlls.tolist())


def _window_nll(session: Session, window: np.ndarray) -> float:
    """Mean NLL, nats, of the tokens of one window, int64 [L], after the first."""
    chunks = _logits_of(session, None, window)
    return float(np.concatenate([nll_per_token(own, to) for own, _, to in chunks]).mean())


@dataclass(frozen=True)
class Quality:
    """A session on windows of text; the last three lists are empty where there is no reference.

    Attributes:
        window_nlls: mean negative log-likelihood of each window, nats.
        reference_nlls: the same, of the reference.
        window_kls: mean KL(reference || session) per token of each window, nats.
        window_agreements: fraction of each window's tokens at which both have the same likeliest
            next token.
        seconds: what measuring took, both sessions together.
    """

    window_nlls: list[float]
    reference_nlls: list[float]
    window_kls: list[float]
    window_agreements: list[float]
    seconds: float

    @property
    def kl(self) -> float | None:
        """Mean KL(reference || session) per token, nats; windows are equally long."""
        return float(np.mean(self.window_kls)) if self.window_kls else None

    @property
    def top1(self) -> float | None:
        """Fraction of all tokens at which both have the same likeliest next token."""
        return float(np.mean(self.window_agreements)) if self.window_agreements else None


class Windows:
    """Windows that are measured one after another, and what was found so far.

    Args:
        count: how many there will be.
        tell: is given a line of progress after each window.
    """

    def __init__(self, count: int, tell: Callable[[str], None]) -> None:
        self._count, self._tell, self._started = count, tell, time.perf_counter()
        self._columns: list[np.ndarray] = []

    def add(self, column: np.ndarray) -> None:
        """Take what `window_quality` returned of the next one."""
        self._columns.append(column)
        perplexity = np.exp(np.mean([each[0] for each in self._columns]))
        place = f"window {len(self._columns)} of {self._count}"
        self._tell(f"  {place}: perplexity {perplexity:.2f}")

    def quality(self) -> Quality:
        """Of all of them."""
        own, *others = np.stack(self._columns, axis=1).tolist()
        reference_nlls, kls, agreements = others or ([], [], [])
        seconds = round(time.perf_counter() - self._started, 1)
        return Quality(own, reference_nlls, kls, agreements, seconds)


def measure_quality(
    session: Session,
    reference: Session | None,
    windows: np.ndarray,
    tell: Callable[[str], None] = lambda message: None,
) -> Quality:
    """Run windows through a session and, side by side, through the reference.

    Args:
        session: what is tested.
        reference: what it should be like; None measures the session alone.
        windows: int64 [W, L]; each starts on an empty cache and predicts its tokens after the
            first.
        tell: is given a line of progress after each window.

    Raises:
        InputError: a window is longer than a session's cache.
    """
    measured = Windows(len(windows), tell)
    for window in windows:
        measured.add(window_quality(session, reference, window))
    return measured.quality()


def window_quality(session: Session, reference: Session | None, window: np.ndarray) -> np.ndarray:
    """Means over the tokens of one window, int64 [L], after the first.

    Returns:
        float64 [1]: NLL, nats; with a reference [4]: NLL, its NLL, KL, and the fraction at which
        both have the same likeliest next token.
    """
    parts = [_measure_chunk(*chunk) for chunk in _logits_of(session, reference, window)]
    mean: np.ndarray = np.concatenate(parts, axis=1).mean(axis=1)
    return mean


def _measure_chunk(
    logits: np.ndarray, reference: np.ndarray | None, targets: np.ndarray
) -> np.ndarray:
    """What there is to know of each token of a chunk.

    Args:
        logits: float32 [S, V].
        reference: float32 [S, V], or None.
        targets: int64 [S], the tokens to predict.

    Returns:
        float64 [1, S]: NLL, nats; with a reference [4, S]: NLL, its NLL, KL, 1 for agreement.
    """
    own = nll_per_token(logits, targets)
    if reference is None:
        return own[None]
    same = (reference.argmax(axis=-1) == logits.argmax(axis=-1)).astype(np.float64)
    divergences = kl_per_token(reference, logits)
    return np.stack([own, nll_per_token(reference, targets), divergences, same])


def _logits_of(
    session: Session, reference: Session | None, window: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
    """Chunk by chunk of one window, int64 [L]: logits, reference logits, tokens to predict.

    No more than CHUNK_TOKENS rows of logits of each exist at a time.
    """
    session.reset()
    if reference is not None:
        reference.reset()
    inputs, targets = window[:-1], window[1:]
    for start in range(0, len(inputs), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        others = None if reference is None else reference.forward(inputs[None, part])[0]
        yield session.forward(inputs[None, part])[0], others, targets[part]
