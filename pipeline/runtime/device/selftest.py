"""Whether an engine on this board agrees with itself: graph, launches, blocks, steps, rewinds.

It needs no reference and no tokenizer: whatever the model says, it has to say it in every way that
the runtime computes it. It finds addresses, masks and captures that are wrong, not wrong weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ValidationError
from pipeline.runtime.device.session import DeviceSession

# Room for sums of float16 in another order, over all layers; another token, position or mask gives
# logits of another direction.
_LEAST_COSINE = 0.999
_LENGTH = 24


@dataclass(frozen=True)
class Outcome:
    """One check: its name, the cosine of what was compared, and whether that is enough."""

    name: str
    cosine: float

    @property
    def passed(self) -> bool:
        return self.cosine >= _LEAST_COSINE


def run_selftest(session: DeviceSession, seed: int = 0) -> list[Outcome]:
    """Compute the same logits in several ways.

    Args:
        session: fresh; its cache is left empty.
        seed: of the tokens.

    Raises:
        ValidationError: two ways differ, or logits are not finite; says which.
    """
    length = min(_LENGTH, session.max_length - 1)
    ids = np.random.default_rng(seed).integers(0, session.vocab_size, (1, length))
    stepped = _by_steps(session, ids)
    checks: dict[str, Callable[[], np.ndarray]] = {
        "a step again, from the graph": lambda: _by_steps(session, ids),
        "all tokens in blocks": lambda: _in_blocks(session, ids),
        "a rewind, and the tokens again": lambda: _rewound(session, ids),
        "a second session": lambda: _in_blocks(session.sibling(), ids),
    }
    outcomes = [Outcome(name, _cosine(stepped, compute())) for name, compute in checks.items()]
    session.reset()
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        raise ValidationError(
            "The engine contradicts itself on this device.",
            where=session.name,
            observed="; ".join(f"{one.name}: cosine {one.cosine:.4f}" for one in failed),
            expected=f"at least {_LEAST_COSINE}",
            change="build the engine again on this device; if it stays so, report it with the "
            "output of `skipcat-device describe`",
        )
    return outcomes


def _by_steps(session: DeviceSession, ids: np.ndarray) -> np.ndarray:
    """Logits of every token, each read by a call of its own."""
    session.reset()
    return np.concatenate([session.forward(ids[:, [place]]) for place in range(ids.size)], axis=1)


def _in_blocks(session: DeviceSession, ids: np.ndarray) -> np.ndarray:
    session.reset()
    return session.forward(ids)


def _rewound(session: DeviceSession, ids: np.ndarray) -> np.ndarray:
    """Logits of which the second half comes after other tokens were read and forgotten."""
    session.reset()
    half = ids.size // 2
    first = session.forward(ids[:, :half])
    session.forward(ids[:, half:][:, ::-1])
    session.rewind(half)
    return np.concatenate([first, session.forward(ids[:, half:])], axis=1)


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Smallest cosine between the logits of a token in two arrays [1, S, V]; 0 for NaN or Inf."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return 0.0
    products = (first * second).sum(-1)
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return float((products / np.maximum(norms, np.finfo(np.float32).tiny)).min())
