"""A step of the scheduler over a session that reads what all answers want in one pass.

Where a pass over the weights is what takes the time, as of a model that is read from disk, prompts
and answers go on together: each by its chunk, or by its last token and draft tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.runtime.prefix_cache import SlotTable
from pipeline.runtime.sessions.session import Block, BlockSession
from pipeline.serve.failure import RequestFailure
from pipeline.serve.running import Running, take_back

logger = logging.getLogger(__name__)
_Take = Callable[[Running, Iterable[np.ndarray], Sequence[int]], int]


@dataclass(frozen=True)
class _Wish:
    """What an answer wants read: a chunk of its prompt, or its last token and draft tokens."""

    running: Running
    ids: list[int]
    drafted: list[int]

    @property
    def block(self) -> Block:
        is_prompt = bool(self.running.pending)
        return Block(self.running.slot, np.array(self.ids, np.int64), last_only=is_prompt)


def read_in_one_pass(
    session: BlockSession,
    table: SlotTable,
    all_running: Iterable[Running],
    chunk: int,
    take: _Take,
    fail: Callable[[Running, RequestFailure], None],
) -> None:
    """Let every answer go on by one pass; after a failure each alone, so that one alone fails.

    Args:
        session: of the slots.
        table: of what they hold.
        all_running: answers, and prompts to be read; those that wait for a reader are left alone.
        chunk: most tokens of a prompt.
        take: lets an answer go on by rows of logits; returns how many draft tokens it accepts.
        fail: gives an answer up.
    """
    ready = [running for running in all_running if running.can_go_on]
    wishes = [_wish_of(running, len(table.tokens[running.slot]), chunk) for running in ready]
    if not wishes:
        return
    try:
        found = session.read_blocks([wish.block for wish in wishes])
    except Exception:
        logger.exception("A pass for %d slots failed; trying one by one.", len(wishes))
        for wish in wishes:
            _go_on_alone(session, table, wish, take, fail)
        return
    for wish, rows in zip(wishes, found, strict=True):
        _go_on(session, table, wish, rows, take)


def _wish_of(running: Running, held: int, chunk: int) -> _Wish:
    if running.pending:
        return _Wish(running, running.pending[: chunk - held % chunk], [])
    try:
        drafted = running.answer.draft(running.job.outbox.room)
    except Exception:
        logger.exception("Drafting for slot %d failed.", running.slot)
        drafted = []
    return _Wish(running, [running.answer.ids[-1], *drafted], drafted)


def _go_on_alone(
    session: BlockSession,
    table: SlotTable,
    wish: _Wish,
    take: _Take,
    fail: Callable[[Running, RequestFailure], None],
) -> None:
    slot = wish.running.slot
    try:
        take_back(session, slot, len(table.tokens[slot]))
        rows = session.read_blocks([wish.block])[0]
    except Exception:
        logger.exception("Slot %d failed alone, too.", slot)
        fail(wish.running, RequestFailure.internal("The model failed."))
    else:
        _go_on(session, table, wish, rows, take)


def _go_on(
    session: BlockSession, table: SlotTable, wish: _Wish, rows: np.ndarray, take: _Take
) -> None:
    """Note what a slot holds now, and let its answer go on by the logits."""
    running, held = wish.running, table.tokens[wish.running.slot]
    if running.pending:
        held += wish.ids
        del running.pending[: len(wish.ids)]
        if not running.pending:
            take(running, rows, ())
        return
    held.append(wish.ids[0])
    held += wish.drafted[: take(running, rows, wish.drafted)]
    take_back(session, running.slot, len(held))
