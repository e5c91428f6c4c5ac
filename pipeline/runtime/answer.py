"""One answer of a session to one prompt, streamed, timed, and with the reason why it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.runtime.drafting import Lookup
from pipeline.runtime.generate import generate
from pipeline.runtime.prefix_cache import Transcript
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.text_stream import Decoder, Detokenizer, StopStrings


@dataclass(frozen=True)
class Answer:
    """What came out, and how fast.

    Attributes:
        text: the answer.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer.
        first_token_s: seconds to the first token (reading the prompt).
        tokens_per_s: tokens after the first, per second; None for fewer than two.
        drafted_tokens: tokens that were guessed, for a call to read several; 0 without a lookup.
        taken_tokens: how many of them were right.
        ended: `stop` (a stop token or string), `length` (the limit asked for) or `context` (the
            cache is full).
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    tokens_per_s: float | None
    drafted_tokens: int
    taken_tokens: int
    ended: str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON."""
        return asdict(self)


def answer(
    session: Session | Transcript,
    tokenizer: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    generator: np.random.Generator,
    emit: Callable[[str], None],
    stops: Sequence[str] = (),
    lookup: Lookup | None = None,
) -> Answer:
    """Generate an answer and pass its text to `emit` piece by piece, up to the first of `stops`.

    Raises:
        InputError: the prompt is empty, or longer than the session's cache.
    """
    detokenizer, watcher = Detokenizer(tokenizer), StopStrings(stops)
    pieces: list[str] = []
    times_s = [time.perf_counter()]

    def put(text: str) -> None:
        if text:
            pieces.append(text)
            emit(text)

    ids = generate(session, prompt_ids, max_new_tokens, sampling, stop_ids, generator, lookup)
    for token in ids:
        times_s.append(time.perf_counter())
        put(watcher.push(detokenizer.push(token)))
        if watcher.found is not None:
            break
    put(watcher.push(detokenizer.finish()))
    put(watcher.finish())
    new_tokens = len(times_s) - 1
    ended = why_ended(len(prompt_ids), new_tokens, max_new_tokens, session.max_length)
    return Answer(
        text="".join(pieces),
        prompt_tokens=len(prompt_ids),
        new_tokens=new_tokens,
        first_token_s=times_s[1] - times_s[0] if new_tokens else time.perf_counter() - times_s[0],
        tokens_per_s=decode_rate(times_s),
        drafted_tokens=lookup.drafted if lookup else 0,
        taken_tokens=lookup.taken if lookup else 0,
        ended=ended if watcher.found is None else "stop",
    )


def decode_rate(times_s: list[float]) -> float | None:
    """Tokens per second after the first token; `times_s` is the start and then every token."""
    if len(times_s) < 3:
        return None
    return (len(times_s) - 2) / (times_s[-1] - times_s[1])


def why_ended(prompt_tokens: int, new_tokens: int, max_new_tokens: int, max_length: int) -> str:
    """`length`, `context` or `stop`: which of the three ends of `generate` was reached."""
    if new_tokens == max_new_tokens:
        return "length"
    return "context" if prompt_tokens + new_tokens > max_length else "stop"
