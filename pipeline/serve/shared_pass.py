"""A step of the scheduler over a session that reads what all answers want in one pass.

Where a pass over the weights is what takes the time, as of a model that is read from disk, prompts
and answers go on together: each by its chunk, or by its last token and draft tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.runtime.draft_tree import parents_in_block
from pipeline.runtime.sessions.session import Block, BlockSession
from pipeline.serve.failure import RequestFailure
from pipeline.serve.running import Passes, Running

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wish:
    """What an answer wants read: a chunk of its prompt, or its last token and draft tokens."""

    running: Running
    ids: list[int]
    drafted: Sequence[int]

    @property
    def block(self) -> Block:
        is_prompt = bool(self.running.pending)
        parents = parents_in_block(self.drafted)
        return Block(self.running.slot, np.array(self.ids, np.int64), is_prompt, parents)


@dataclass(frozen=True)
class SharedPass(Passes):
    """Over a session of which one call costs about the same for one answer and for many."""

    session: BlockSession

    def step(self, all_running: Collection[Running]) -> None:
        """Let every answer go on by one pass; after a failure each alone, so that one alone fails.

        Answers that wait for a reader are left alone.
        """
        wishes = [self._wish_of(running) for running in all_running if running.can_go_on]
        if not wishes:
            return
        try:
            found = self.session.read_blocks([wish.block for wish in wishes])
        except Exception:
            logger.exception("A pass for %d slots failed; trying one by one.", len(wishes))
            for wish in wishes:
                self._go_on_alone(wish)
            return
        for wish, rows in zip(wishes, found, strict=True):
            self._go_on(wish, rows)

    def _wish_of(self, running: Running) -> _Wish:
        if running.pending:
            return _Wish(running, self.next_chunk(running), ())
        try:
            drafted = running.answer.draft(running.job.outbox.room)
        except Exception:
            logger.exception("Drafting for slot %d failed.", running.slot)
            drafted = ()
        return _Wish(running, [running.answer.ids[-1], *drafted], drafted)

    def _go_on_alone(self, wish: _Wish) -> None:
        try:
            self.take_back(wish.running)
            rows = self.session.read_blocks([wish.block])[0]
        except Exception:
            logger.exception("Slot %d failed alone, too.", wish.running.slot)
            self.fail(wish.running, RequestFailure.internal("The model failed."))
        else:
            self._go_on(wish, rows)

    def _go_on(self, wish: _Wish, rows: np.ndarray) -> None:
        """Note what a slot holds now, and let its answer go on by the logits."""
        running, held = wish.running, self.table.tokens[wish.running.slot]
        if running.pending:
            held += wish.ids
            del running.pending[: len(wish.ids)]
            if not running.pending:
                self.take(running, rows, ())
            return
        held.append(wish.ids[0])
        path = self.take(running, rows, wish.drafted)
        held += [wish.drafted[n] for n in path]
        self.session.keep_path(running.slot, [1 + n for n in path])
        self.take_back(running)
