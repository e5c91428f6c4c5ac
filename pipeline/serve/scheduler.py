"""The one thread that runs the model: requests join, advance together and leave.

Every step reads at most one chunk of one prompt, and then decodes one token of every answer that
has room for it. A long prompt therefore holds the other answers up by one chunk between two of
their tokens, and never by all of it. Nothing here waits for a client.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from pipeline.runtime.drafting import Lookup
from pipeline.runtime.sessions.slots import BlockSlotSession, SlotSession
from pipeline.runtime.text_stream import Decoder
from pipeline.serve.answering import Answering
from pipeline.serve.failure import RequestFailure, internal, shutting_down, too_busy
from pipeline.serve.job import Job
from pipeline.serve.slot_table import SlotTable, kept_tokens

logger = logging.getLogger(__name__)

# Large enough that reading a prompt is bound by arithmetic and not by reading the weights, small
# enough that the others miss no more than a few tokens. Chunks end at multiples of it, whatever
# else runs, so that an answer does not depend on who else asks.
PREFILL_CHUNK = 64
LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Load:
    """How busy the scheduler is: answers in slots, requests waiting, and the limits of both."""

    running: int
    waiting: int
    slots: int
    queue: int


class Scheduler:
    """Answers jobs over a `SlotSession`, which nothing else may use meanwhile.

    Args:
        session: freshly opened.
        decoder: turns tokens into text; used by this thread alone.
        stop_ids: tokens that end an answer.
        queue: most jobs that wait for a slot.
        prefill_chunk: most tokens of a prompt that one step reads.
        reuse: whether a new prompt may go on from what a slot still holds.
        lookup: whether an answer that runs alone reads guesses beside its last token, where the
            session offers that. A block of tokens rounds otherwise than single ones do, so with
            weights of few bits an answer may then depend on who else asks.
    """

    def __init__(
        self,
        session: SlotSession,
        decoder: Decoder,
        stop_ids: frozenset[int],
        *,
        queue: int,
        prefill_chunk: int = PREFILL_CHUNK,
        reuse: bool = True,
        lookup: bool = False,
    ) -> None:
        self._blocks = session if lookup and isinstance(session, BlockSlotSession) else None
        self._session, self._decoder, self._stop_ids = session, decoder, stop_ids
        self._queue, self._chunk, self._reuse = queue, prefill_chunk, reuse
        self._table = SlotTable(session.slots)
        self._running: dict[int, Answering] = {}  # by slot, in order of arrival
        self._waiting: deque[Job] = deque()
        self._condition = threading.Condition()
        self._deadline: float | None = None
        self._is_closed = False
        self._step_s = 0.0
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    # --- called by other threads ---

    def submit(self, job: Job) -> None:
        """Take a job; everything further goes through its outbox.

        Raises:
            RequestFailure: 429, too many wait already; 503, no more are taken.
        """
        with self._condition:
            if self._deadline is not None or self._is_closed:
                raise shutting_down()
            if len(self._running) + len(self._waiting) >= self._session.slots + self._queue:
                raise too_busy(self._retry_after_s())
            self._waiting.append(job)
            self._condition.notify()

    def cancel(self, job: Job) -> None:
        """Free what a job holds, at the latest after the step that runs."""
        with self._condition:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._condition.notify()

    def wake(self) -> None:
        """Look again whether there is something to do."""
        with self._condition:
            self._condition.notify()

    def load(self) -> Load:
        """How busy it is."""
        return Load(len(self._running), len(self._waiting), self._session.slots, self._queue)

    @property
    def is_open(self) -> bool:
        """Whether jobs are taken."""
        return self._deadline is None and not self._is_closed and self._thread.is_alive()

    def drain(self, grace_s: float) -> None:
        """Take no more jobs, turn the waiting ones away, and end the running ones in time."""
        with self._condition:
            if self._deadline is None:
                self._deadline = time.monotonic() + grace_s
            self._turn_away()
            self._condition.notify()

    def close(self) -> None:
        """End everything now, and the thread."""
        with self._condition:
            self._is_closed = True
            self._turn_away()
            self._condition.notify()
        self._thread.join()

    def _turn_away(self) -> None:
        while self._waiting:
            self._waiting.popleft().outbox.put(shutting_down())

    def _retry_after_s(self) -> int:
        """Roughly when a slot comes free: the tokens still to come, shared by the slots."""
        wanted = sum(job.max_new_tokens for job in self._waiting)
        estimate_s = self._step_s * wanted / self._session.slots
        return max(1, min(LONGEST_RETRY_S, round(estimate_s)))

    # --- the thread ---

    def _work(self) -> None:
        while self._wait_for_work():
            started = time.monotonic()
            try:
                self._step()
            except Exception:
                logger.exception("A step of the scheduler failed; the answers in it are given up.")
                for answering in list(self._running.values()):
                    self._fail(answering, internal("The model failed."))
            self._step_s += 0.1 * (time.monotonic() - started - self._step_s)
        for answering in list(self._running.values()):
            self._fail(answering, shutting_down())

    def _wait_for_work(self) -> bool:
        """Sleep until a step has something to do; False when closed."""
        with self._condition:
            while not self._is_closed and not self._has_work():
                timeout_s = None
                if self._deadline is not None and self._running:
                    timeout_s = max(0.0, self._deadline - time.monotonic())
                self._condition.wait(timeout_s)
            return not self._is_closed

    def _has_work(self) -> bool:
        if self._waiting and self._table.free:
            return True
        if self._running and self._is_overdue():
            return True
        return any(can_go_on(answering) for answering in self._running.values())

    def _is_overdue(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _step(self) -> None:
        self._drop_answers()
        self._admit_jobs()
        self._read_chunk()
        self._decode_tokens()

    def _drop_answers(self) -> None:
        """Free the slots of cancelled jobs, and all of them after the deadline."""
        is_overdue = self._is_overdue()
        for answering in list(self._running.values()):
            if answering.job.is_cancelled:
                self._release(answering)
            elif is_overdue:
                answering.job.outbox.put(shutting_down())
                self._release(answering)

    def _admit_jobs(self) -> None:
        """Give free slots to waiting jobs, first come first served."""
        while self._table.free:
            with self._condition:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                slot, shared = self._table.take(job.prompt_ids, self._reuse)
                shared = kept_tokens(shared, len(job.prompt_ids), self._chunk)
                room = self._session.max_length
                lookup = Lookup(self._blocks.row_cost) if self._blocks else None
                answering = Answering(job, slot, room, self._decoder, self._stop_ids, lookup)
                self._running[slot] = answering
            try:
                answering.skip(self._go_back(slot, shared))
            except Exception:
                logger.exception("Slot %d could not be made ready.", slot)
                self._fail(answering, internal("The model failed."))

    def _go_back(self, slot: int, length: int) -> int:
        """Leave only the first tokens of a slot; returns how many the session could keep."""
        held = self._session.slot_length(slot)
        if 0 < length < held:
            self._session.rewind_slot(slot, length)
            held = self._session.slot_length(slot)
        # It may have given up tokens by itself, of a slot that was free.
        if not 0 < held <= length:
            self._session.clear(slot)
            held = 0
        del self._table.tokens[slot][held:]
        return held

    def _read_chunk(self) -> None:
        """Read the next chunk of the prompt that came first."""
        reading = (a for a in self._running.values() if a.pending)
        answering = next(reading, None)
        if answering is None:
            return
        held = self._table.tokens[answering.slot]
        chunk = answering.pending[: self._chunk - len(held) % self._chunk]
        try:
            logits = self._session.prefill(answering.slot, np.array(chunk, np.int64))
        except Exception:
            logger.exception("Reading a prompt failed.")
            self._fail(answering, internal("The model failed to read the prompt."))
            return
        held += chunk
        del answering.pending[: len(chunk)]
        if not answering.pending:
            self._take(answering, logits)

    def _decode_tokens(self) -> None:
        """One token more for every answer that has room for it."""
        ready = [a for a in self._running.values() if a.token is not None and can_go_on(a)]
        if not ready:
            return
        try:
            if len(self._running) == 1 and (drafted := ready[0].draft()):
                self._decode_drafted(ready[0], drafted)
                return
            logits = self._decode(ready)
        except Exception:
            logger.exception("Decoding %d slots together failed; trying one by one.", len(ready))
            self._decode_apart(ready)
            return
        for answering, row in zip(ready, logits, strict=True):
            self._take(answering, row)

    def _decode(self, ready: list[Answering]) -> np.ndarray:
        """Feed the last token of each; float32 [len(ready), V]."""
        tokens = [answering.token for answering in ready if answering.token is not None]
        logits = self._session.decode([answering.slot for answering in ready], tokens)
        for answering, token in zip(ready, tokens, strict=True):
            self._table.tokens[answering.slot].append(token)
        return logits

    def _decode_drafted(self, answering: Answering, drafted: list[int]) -> None:
        """Feed the last token of the only answer and guesses behind it; keep those it chooses."""
        assert self._blocks is not None
        assert answering.token is not None
        slot, held = answering.slot, self._table.tokens[answering.slot]
        block = np.array([answering.token, *drafted], np.int64)
        rows = self._blocks.read_block(slot, block)
        held.append(answering.token)
        for logits, guess in zip(rows, [*drafted, None], strict=True):
            self._take(answering, logits)
            if answering.slot not in self._running or answering.token != guess:
                break
            held.append(answering.token)
        self._take_back(slot, len(held))

    def _decode_apart(self, ready: list[Answering]) -> None:
        """After a failure of all together: each alone, so that only the one at fault fails."""
        for answering in ready:
            try:
                length = len(self._table.tokens[answering.slot])
                self._take_back(answering.slot, length)
                logits = self._decode([answering])[0]
            except Exception:
                logger.exception("Decoding slot %d failed.", answering.slot)
                self._fail(answering, internal("The model failed."))
            else:
                self._take(answering, logits)

    def _take_back(self, slot: int, length: int) -> None:
        """Undo a token that a failed call may have appended.

        Raises:
            RuntimeError: the session cannot.
        """
        if self._session.slot_length(slot) != length:
            self._session.rewind_slot(slot, length)
            if self._session.slot_length(slot) != length:
                raise RuntimeError(f"slot {slot} cannot go back to {length} tokens")

    def _take(self, answering: Answering, logits: np.ndarray) -> None:
        """Let an answer go on by one token; free its slot at the end."""
        try:
            answering.take(logits)
        except RequestFailure as failure:
            self._fail(answering, failure)
        except Exception:
            logger.exception("Choosing a token failed.")
            self._fail(answering, internal("Choosing a token failed."))
        else:
            if answering.ending is not None:
                self._release(answering)

    def _fail(self, answering: Answering, failure: RequestFailure) -> None:
        """Give up an answer, and forget what its slot holds: it cannot be trusted any more."""
        answering.job.outbox.put(failure)
        self._table.tokens[answering.slot].clear()
        self._release(answering)

    def _release(self, answering: Answering) -> None:
        with self._condition:
            del self._running[answering.slot]
            self._table.release(answering.slot)


def can_go_on(answering: Answering) -> bool:
    """Whether a step would do something for an answer."""
    if answering.job.is_cancelled or answering.pending:
        return True
    return answering.token is not None and not answering.job.outbox.is_full
