"""A step of the scheduler in passes of their own: a prompt's chunk, then a token of each answer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.serve.failure import RequestFailure
from pipeline.serve.running import Passes, Running

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnPasses(Passes):
    """Over a session for which a prompt's chunk costs more than a token.

    Attributes:
        drafts_for_all: draft tokens are asked for all answers; else for one that runs alone.
    """

    drafts_for_all: bool

    def step(self, all_running: Collection[Running]) -> None:
        """Let every answer go on that has room for it, and a prompt by a chunk."""
        self._read_chunk(all_running)
        self._decode_tokens(all_running)

    def _read_chunk(self, all_running: Collection[Running]) -> None:
        """Read the next chunk of the prompt that came first."""
        running = next((r for r in all_running if r.pending), None)
        if running is None:
            return
        chunk = self.next_chunk(running)
        try:
            logits = self.session.prefill(running.slot, np.array(chunk, np.int64))
        except Exception:
            logger.exception("Reading a prompt failed.")
            self.fail(running, RequestFailure.internal("The model failed to read the prompt."))
            return
        self.table.tokens[running.slot] += chunk
        del running.pending[: len(chunk)]
        if not running.pending:
            self.take(running, [logits], ())

    def _decode_tokens(self, all_running: Collection[Running]) -> None:
        """One token more for every answer that has room for it."""
        ready = [r for r in all_running if r.answer.token is not None and r.can_go_on]
        if len(all_running) == 1 or self.drafts_for_all:
            ready = [running for running in ready if not self._went_on_drafted(running)]
        if not ready:
            return
        try:
            logits = self._decode(ready)
        except Exception:
            logger.exception("Decoding %d slots together failed; trying one by one.", len(ready))
            self._decode_apart(ready)
            return
        for running, row in zip(ready, logits, strict=True):
            self.take(running, [row], ())

    def _decode(self, ready: Sequence[Running]) -> np.ndarray:
        """Feed the last token of each; float32 [len(ready), V]."""
        tokens = [running.answer.ids[-1] for running in ready]
        logits = self.session.decode([running.slot for running in ready], tokens)
        for running, token in zip(ready, tokens, strict=True):
            self.table.tokens[running.slot].append(token)
        return logits

    def _went_on_drafted(self, running: Running) -> bool:
        """Whether there were draft tokens for an answer: no more than its outbox has room for."""
        try:
            if drafted := running.answer.draft(running.job.outbox.room):
                self._decode_drafted(running, drafted)
        except Exception:
            logger.exception("Slot %d failed with draft tokens; trying without.", running.slot)
            self._decode_apart([running])
            return True
        return bool(drafted)

    def _decode_drafted(self, running: Running, drafted: Sequence[int]) -> None:
        """Feed the last token of an answer and draft tokens; keep those that it accepts."""
        token, held = running.answer.ids[-1], self.table.tokens[running.slot]
        rows = self.session.read_block(running.slot, np.array([token, *drafted], np.int64))
        held.append(token)
        held += [drafted[n] for n in self.take(running, rows, drafted)]
        self.take_back(running)

    def _decode_apart(self, ready: Sequence[Running]) -> None:
        """After a failure of all together: each alone, so that only the one at fault fails."""
        for running in ready:
            try:
                self.take_back(running)
                logits = self._decode([running])
            except Exception:
                logger.exception("Decoding slot %d failed.", running.slot)
                self.fail(running, RequestFailure.internal("The model failed."))
            else:
                self.take(running, logits, ())
