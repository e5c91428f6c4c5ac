"""Perplexity of a session over fixed windows of a text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.runtime.sessions.session import Session
from validate.metrics import nll_per_token, perplexity_with_error

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
    window_nlls = np.array([window_nll(session, window) for window in windows])
    value, error = perplexity_with_error(window_nlls)
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(value, error, predicted, window_nlls.tolist())


def window_nll(session: Session, window: np.ndarray) -> float:
    """Mean NLL, nats, of the tokens of one window, int64 [L], after the first.

    The window goes in by chunks, so that no more than CHUNK_TOKENS rows of logits exist at a time.
    """
    session.reset()
    inputs, targets = window[:-1], window[1:]
    nlls = []
    for start in range(0, len(inputs), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        logits = session.forward(inputs[None, part])[0]  # [S, V]
        nlls.append(nll_per_token(logits, targets[part]))
    return float(np.concatenate(nlls).mean())
