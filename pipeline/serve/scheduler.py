"""The one thread that runs the model: requests join, advance together and leave.

Every step reads at most one chunk of one prompt, and then decodes one token of every answer that
has room for it (`own_passes.py`), or does all of that in one pass (`shared_pass.py`). A long prompt
therefore holds the other answers up by one chunk between two of their tokens, and never by all of
it. Nothing here waits for a client.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.progress import note
from pipeline.runtime.drafting import DraftSource, make_drafter
from pipeline.runtime.prefix_cache import SlotTable
from pipeline.runtime.sequence import Rows
from pipeline.runtime.sessions.session import BlockSession, SlotSession
from pipeline.runtime.text_stream import Decoder
from pipeline.serve.failure import RequestFailure
from pipeline.serve.job import Job, Load
from pipeline.serve.own_passes import OwnPasses
from pipeline.serve.running import (
    FiniteRows,
    Running,
    keep_beginning,
    start_job,
)
from pipeline.serve.shared_pass import SharedPass

logger = logging.getLogger(__name__)

# Large enough that reading a prompt is bound by arithmetic and not by reading the weights, small
# enough that the others miss no more than a few tokens. Chunks end at multiples of it, whatever
# else runs, so that an answer does not depend on who else asks.
PREFILL_CHUNK = 64
_LONGEST_RETRY_S = 60


class Scheduler:
    """Answers jobs over a `SlotSession`, which nothing else may use meanwhile.

    Args:
        session: freshly opened.
        decoder: turns tokens into text; used by this thread alone.
        stop_ids: tokens that end an answer.
        queue: most jobs that wait for a slot.
        prefill_chunk: most tokens of a prompt that one step reads.
        reuse: whether a new prompt may go on from what a slot still holds.
        drafter: what proposes draft tokens for an answer that runs alone, where that saves the
            session time; None for nothing. A block of tokens rounds otherwise than single ones do,
            so low-bit answers may depend on the batch then. A draft model drafts for every answer,
            and in a shared pass whatever drafts does.

    Attributes:
        death: what ended the thread, if it ended by a failure.
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
        drafter: str | DraftSource | None = None,
    ) -> None:
        self._session, self._decoder, self._stop_ids = session, decoder, stop_ids
        self._queue, self._chunk, self._reuse = queue, prefill_chunk, reuse
        self._drafter, self._source = drafter, None if isinstance(drafter, str) else drafter
        self._table = SlotTable(session.slots)
        self._passes = self._passes_of(session)
        self._running: dict[int, Running] = {}  # by slot, in order of arrival
        self._waiting: deque[Job] = deque()
        self._reserved = 0  # places of jobs whose prompt is being read
        self._condition = threading.Condition()
        self._on_death = lambda: None
        self._deadline: float | None = None
        self._is_closed = False
        self.death: BaseException | None = None
        self._step_s = 0.0
        self._thread = threading.Thread(target=self._work, name="scheduler", daemon=True)
        self._thread.start()

    # --- called by other threads ---

    @contextmanager
    def places(self, count: int) -> Iterator[Callable[[Job], None]]:
        """Keep places for jobs while their prompt is read, which is work like theirs.

        Args:
            count: of the jobs.

        Yields:
            Takes a job to one of the places; everything further goes through its outbox. It raises
            as this does.

        Raises:
            RequestFailure: 429, too many wait; 503, no more are taken; 400, more than all places.
        """
        with self._condition:
            self._require_open()
            limit = self._session.slots + self._queue
            if count > limit:
                raise RequestFailure(400, f"At most {limit} answers at a time.", param="n")
            if self._inside() + count > limit:
                raise RequestFailure.too_busy(self._retry_after_s())
            self._reserved += count
        left = count

        def submit(job: Job) -> None:
            nonlocal left
            with self._condition:
                self._require_open()
                left -= 1
                self._reserved -= 1
                self._waiting.append(job)
                self._condition.notify()

        try:
            yield submit
        finally:
            with self._condition:
                self._reserved -= left

    def submit(self, job: Job) -> None:
        """Take one job; everything further goes through its outbox.

        Raises:
            RequestFailure: 429, too many wait already; 503, no more are taken.
        """
        with self.places(1) as submit:
            submit(job)

    def on_death(self, tell: Callable[[], None]) -> None:
        """Have something called, from the thread, when the thread ends by a failure of its own."""
        self._on_death = tell

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
        return self._deadline is None and not self._is_closed and self.death is None

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
            self._waiting.popleft().outbox.put(RequestFailure.shutting_down())

    def _require_open(self) -> None:
        """Raise RequestFailure unless jobs are taken."""
        if self.death is not None:
            raise RequestFailure.broken()
        if not self.is_open:
            raise RequestFailure.shutting_down()

    def _inside(self) -> int:
        """Places that are taken."""
        return len(self._running) + len(self._waiting) + self._reserved

    def _retry_after_s(self) -> int:
        """Roughly when a slot comes free: the tokens still to come, shared by the slots."""
        most = self._session.max_length
        wanted = sum(min(job.decoding.max_new_tokens, most) for job in self._waiting)
        estimate_s = self._step_s * wanted / self._session.slots
        return max(1, min(_LONGEST_RETRY_S, round(estimate_s)))

    # --- the thread ---

    def _passes_of(self, session: SlotSession) -> OwnPasses | SharedPass:
        """How a step lets answers go on."""
        if isinstance(session, BlockSession):
            return SharedPass(session, self._table, self._chunk, self._take, self._fail)
        drafts_for_all = self._source is not None
        return OwnPasses(session, self._table, self._chunk, self._take, self._fail, drafts_for_all)

    def _work(self) -> None:
        try:
            self._advance()
        except BaseException as error:  # a panic of a library in Rust is no Exception
            logger.critical("The thread that runs the model has ended.", exc_info=error)
            self._die(error)

    def _advance(self) -> None:
        """Step by step, until closed."""
        while self._wait_for_work():
            started = time.monotonic()
            try:
                self._step()
            except Exception:
                logger.exception("A step of the scheduler failed; the answers in it are given up.")
                for running in list(self._running.values()):
                    self._fail(running, RequestFailure.internal("The model failed."))
            self._step_s += 0.1 * (time.monotonic() - started - self._step_s)
        for running in list(self._running.values()):
            self._fail(running, RequestFailure.shutting_down())

    def _die(self, error: BaseException) -> None:
        """Nobody waits for a thread that is no more: fail everything, and tell the server."""
        with self._condition:
            self.death = error
            left = [running.job for running in self._running.values()] + list(self._waiting)
            self._running.clear()
            self._waiting.clear()
        for job in left:
            job.outbox.put(RequestFailure.broken())
        self._on_death()

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
        return any(running.can_go_on for running in self._running.values())

    def _is_overdue(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _step(self) -> None:
        self._drop_answers()
        self._admit_jobs()
        self._passes.step(self._running.values())

    def _drop_answers(self) -> None:
        """Free the slots of cancelled jobs, and all of them after the deadline."""
        is_overdue = self._is_overdue()
        for running in list(self._running.values()):
            if running.job.is_cancelled:
                self._release(running)
            elif is_overdue:
                running.job.outbox.put(RequestFailure.shutting_down())
                self._release(running)

    def _admit_jobs(self) -> None:
        """Give free slots to waiting jobs, first come first served."""
        while self._table.free:
            with self._condition:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                slot, kept = self._table.take(job.prompt_ids, self._chunk, self._reuse)
                running = self._running[slot] = self._start(job, slot)
            try:
                running.cached = keep_beginning(self._session, self._table, slot, kept)
                del running.pending[: running.cached]
            except Exception:
                logger.exception("Slot %d could not be made ready.", slot)
                self._fail(running, RequestFailure.internal("The model failed."))

    def _start(self, job: Job, slot: int) -> Running:
        """The beginning of the answer to a job that waits no more."""
        try:
            drafter = make_drafter(self._session, self._drafter, slot)
            length = self._session.max_length
            return start_job(job, slot, length, self._decoder, self._stop_ids, drafter)
        except BaseException:
            self._table.release(slot)
            job.outbox.put(RequestFailure.internal("The answer could not begin."))
            raise

    def _take(self, running: Running, rows: Rows, drafted: Sequence[int] = ()) -> list[int]:
        """Let an answer go on, and free its slot at the end; returns accepted draft tokens."""
        try:
            accepted = running.answer.take(FiniteRows(rows), drafted)
        except RequestFailure as failure:
            self._fail(running, failure)
        except BaseException:  # a panic of the tokenizer, too, is the matter of this answer alone
            logger.exception("Choosing a token failed.")
            self._fail(running, RequestFailure.internal("Choosing a token failed."))
        else:
            self._end(running)
            return accepted
        return []

    def _end(self, running: Running) -> None:
        """Say how an answer ended, and free its slot; nothing where it goes on."""
        if running.answer.ending is None:
            return
        if self._source is not None and (notice := self._source.take_notice()):
            note(notice)
        running.finish()
        self._release(running)

    def _fail(self, running: Running, failure: RequestFailure) -> None:
        """Give up an answer, and forget what its slot holds: it cannot be trusted any more."""
        running.job.outbox.put(failure)
        self._table.tokens[running.slot].clear()
        self._release(running)

    def _release(self, running: Running) -> None:
        with self._condition:
            del self._running[running.slot]
            self._table.release(running.slot)
