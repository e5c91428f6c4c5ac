"""Answers out of a session: ids, text as it comes, a whole answer with its timing, or a batch."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.runtime.draft_tree import parents_in_block
from pipeline.runtime.drafting import Drafter, DraftSource, make_drafter
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sequence import Decoding, RunningAnswer
from pipeline.runtime.sessions.session import Block, BlockSession, Session, SlotSession
from pipeline.runtime.text_stream import Decoder


@dataclass(frozen=True)
class Answer:
    """What came out, and how fast.

    Attributes:
        text: the answer.
        prompt_tokens: length of the prompt.
        new_tokens: length of the answer.
        first_token_s: seconds to the first token (reading the prompt).
        tokens_per_s: tokens after the first, per second; None for fewer than two.
        drafted_tokens: draft tokens that a call read beside the last one; 0 without a drafter.
        taken_tokens: how many of them were accepted.
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


def generate(
    session: Session | PrefixCache,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    drafter: Drafter | None = None,
) -> Iterator[int]:
    """Feed the prompt, and yield the answer's ids as they are chosen.

    Args:
        session: any backend, which starts anew; or a prefix cache, which goes on from what it and
            the prompt have in common.
        prompt_ids: at least one token.
        decoding: how; its stop texts are not looked for.
        drafter: fresh; draft tokens are read beside the last token of a call. Without one every
            call gives one token.

    Raises:
        InputError: the prompt is empty, or longer than the cache.
        UsageError: another stream of the session is open.
    """
    running = RunningAnswer(prompt_ids, decoding, session.max_length, drafter=drafter)
    yield from _advance(session, running)


def stream_text(
    session: Session | PrefixCache,
    decoder: Decoder,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    drafter: Drafter | None = None,
) -> Iterator[str]:
    """The answer's text, piece by piece as it comes; as `generate` otherwise."""
    pieces: list[str] = []
    running = RunningAnswer(
        prompt_ids, decoding, session.max_length, decoder, drafter, pieces.append
    )
    with contextlib.closing(_advance(session, running)) as tokens:
        for _ in tokens:
            yield from pieces
            pieces.clear()
    yield from pieces


def answer(
    session: Session | PrefixCache,
    decoder: Decoder,
    prompt_ids: Sequence[int],
    decoding: Decoding,
    emit: Callable[[str], None] = lambda text: None,
    drafter: Drafter | None = None,
) -> Answer:
    """The whole answer, timed; `emit` gets its text piece by piece. As `generate` otherwise."""
    times_s = [time.perf_counter()]
    running = RunningAnswer(prompt_ids, decoding, session.max_length, decoder, drafter, emit)
    for _ in _advance(session, running, streams=False):
        times_s.append(time.perf_counter())
    assert running.ending is not None
    first_s = times_s[1] if running.ids else time.perf_counter()
    return Answer(
        text=running.text,
        prompt_tokens=len(prompt_ids),
        new_tokens=len(running.ids),
        first_token_s=first_s - times_s[0],
        tokens_per_s=_decode_rate(times_s),
        drafted_tokens=drafter.drafted if drafter else 0,
        taken_tokens=drafter.taken if drafter else 0,
        ended=running.ending,
    )


def _generate_batch(
    session: SlotSession,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    decoder: Decoder | None = None,
) -> list[RunningAnswer]:
    """Answer every prompt to its end; as `stream_batch`, all at once."""
    return list(stream_batch(session, prompts, decoding, decoder))


def stream_batch(
    session: SlotSession,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    decoder: Decoder | None = None,
    seeds: Sequence[int] | None = None,
    drafts: DraftSource | None = None,
) -> Iterator[RunningAnswer]:
    """Answer every prompt to its end; a slot that has finished takes the next one.

    Each prompt has a source of randomness of its own, so that an answer does not depend on which
    others are asked with it. The answers come in the order of their prompts, each as soon as it and
    those before it are at their end.

    Args:
        session: freshly opened, or all slots cleared.
        prompts: ids, at least one token each, of any lengths.
        decoding: how; the seed is a number.
        decoder: turns ids into text; None makes ids alone.
        seeds: of each prompt's source; None seeds it with the seed and the prompt's number.
        drafts: proposes draft tokens for each answer, which are then read slot by slot, but by a
            `BlockSession`, which reads what all answers want in one pass.

    Raises:
        InputError: a prompt is empty, or longer than a slot.
    """
    assert isinstance(decoding.seed, int)
    answers = []
    for number, prompt in enumerate(prompts):
        own = replace(decoding, seed=seeds[number] if seeds else (decoding.seed, number))
        answers.append(RunningAnswer(prompt, own, session.max_length, decoder))
    waiting = deque(answer for answer in answers if answer.ending is None)
    unsaid, running = deque(answers), dict[int, RunningAnswer]()

    while unsaid:
        while unsaid and unsaid[0].ending is not None:
            yield unsaid.popleft()
        for slot in range(session.slots):
            while waiting and slot not in running:
                answer = waiting.popleft()
                _begin(session, slot, answer, drafts)
                if answer.ending is None:
                    running[slot] = answer
        if isinstance(session, BlockSession):
            _read_in_one_pass(session, running)
        elif drafts is not None:
            for slot in sorted(running):
                _decode_drafted(session, slot, running[slot])
        elif running:
            _decode_together(session, running)
        running = {slot: answer for slot, answer in running.items() if answer.ending is None}


def _begin(
    session: SlotSession, slot: int, answer: RunningAnswer, drafts: DraftSource | None
) -> None:
    """Read an answer's prompt into a slot, and take its first token."""
    if drafter := make_drafter(session, drafts, slot):
        answer.draft_by(drafter)
    session.clear(slot)
    if not isinstance(session, BlockSession):  # which reads it beside the others' tokens
        answer.take([session.prefill(slot, np.array(answer.prompt_ids, np.int64))])


def _read_in_one_pass(session: BlockSession, running: Mapping[int, RunningAnswer]) -> None:
    """Let every answer go on in one pass: by its prompt, or by its last token and draft tokens."""
    drafts = {slot: answer.draft() for slot, answer in running.items() if answer.ids}
    blocks = []
    for slot, answer in running.items():
        ids = [answer.ids[-1], *drafts[slot]] if answer.ids else answer.prompt_ids
        parents = parents_in_block(drafts.get(slot, ()))
        blocks.append(Block(slot, np.array(ids, np.int64), not answer.ids, parents))
    for block, rows in zip(blocks, session.read_blocks(blocks) if blocks else (), strict=True):
        drafted = drafts.get(block.slot)
        path = running[block.slot].take(rows, drafted or ())
        if drafted is not None:
            session.keep_path(block.slot, [1 + n for n in path])


def _decode_drafted(session: SlotSession, slot: int, answer: RunningAnswer) -> None:
    """Feed the last token of one answer and its draft tokens, and keep those it accepts."""
    block = [answer.ids[-1], *(drafted := answer.draft())]
    kept = session.slot_length(slot) + 1
    kept += len(answer.take(session.read_block(slot, np.array(block, np.int64)), drafted))
    session.rewind_slot(slot, kept)


def _decode_together(session: SlotSession, running: Mapping[int, RunningAnswer]) -> None:
    """One token more for the answer in each slot, in one call."""
    slots = sorted(running)
    tokens = [running[slot].ids[-1] for slot in slots]
    for slot, logits in zip(slots, session.decode(slots, tokens), strict=True):
        running[slot].take([logits])


def _advance(
    session: Session | PrefixCache, running: RunningAnswer, streams: bool = True
) -> Generator[int, None, None]:
    """Read what an answer wants read until it ends; yields its ids as they are chosen.

    Args:
        session: of nothing else until then, or until this is closed.
        running: the answer.
        streams: whether whoever reads this decides when it goes on.
    """
    cache = session if isinstance(session, PrefixCache) else PrefixCache(session)
    with cache.turn(streams):
        new_ids: Sequence[int] = cache.begin(running.prompt_ids)
        drafted: Sequence[int] = ()
        while running.ending is None:
            known = len(running.ids)
            path = running.take(cache.read(new_ids, drafted), drafted)
            cache.keep(drafted, path)
            yield from running.ids[known:]
            if running.ending is None:
                new_ids, drafted = running.ids[-1:], running.draft()


def _decode_rate(times_s: list[float]) -> float | None:
    """Tokens per second after the first token; `times_s` is the start and then every token."""
    if len(times_s) < 3:
        return None
    return (len(times_s) - 2) / (times_s[-1] - times_s[1])
