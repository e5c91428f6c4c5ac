"""Token by token out of any Session."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from pipeline.errors import InputError
from pipeline.runtime.drafting import Lookup
from pipeline.runtime.prefix_cache import Transcript
from pipeline.runtime.sampling import GREEDY, Sampling, choose_token
from pipeline.runtime.sessions.session import Session


def generate(
    session: Session | Transcript,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_ids: Collection[int] = (),
    generator: np.random.Generator | None = None,
    lookup: Lookup | None = None,
) -> Iterator[int]:
    """Feed the prompt, and yield the answer's ids as they are chosen.

    It ends after `max_new_tokens`, before a stop id (which is not yielded), or when the cache is
    full.

    Args:
        session: any backend, which starts anew; or a transcript, which goes on from what its
            cache and the prompt have in common.
        prompt_ids: at least one token.
        max_new_tokens: most ids to yield.
        sampling: how to choose.
        stop_ids: ids that end the answer.
        generator: source of randomness; None is a generator with seed 0.
        lookup: fresh, guesses tokens for a call to read together; only for a session that can
            rewind. Without it every call gives one token.

    Raises:
        InputError: the prompt is empty, or longer than the cache.
    """
    if not len(prompt_ids):
        raise InputError("The prompt is empty.", change="give at least one token")
    generator = generator or np.random.default_rng(0)
    history = [int(token) for token in prompt_ids]
    transcript = session if isinstance(session, Transcript) else Transcript(session)
    last = min(len(history) + max_new_tokens, session.max_length + 1)
    new_ids, drafted = transcript.begin(history), list[int]()
    if lookup is not None:
        lookup.extend(history)
    while max_new_tokens > 0:
        rows = transcript.read(new_ids, drafted)
        read = len(history)
        for logits, guess in zip(rows, [*drafted, None], strict=True):
            token = choose_token(logits, sampling, history, generator)
            if token in stop_ids:
                return
            yield token
            history.append(token)
            if token != guess or len(history) == last:
                break
        if len(history) == last:
            return
        new_ids = [token]
        if lookup is not None:
            lookup.learn(drafted, history[read:])
            transcript.keep(len(history) - 1)
            drafted = lookup.draft(last - 1 - len(history))
