"""A job in a slot, and the logits that its answer goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.runtime.drafting import Drafter
from pipeline.runtime.prefix_cache import SlotTable
from pipeline.runtime.sequence import Rows, RunningAnswer
from pipeline.runtime.sessions.session import SlotSession
from pipeline.runtime.text_stream import Decoder
from pipeline.serve.failure import RequestFailure
from pipeline.serve.job import Ending, Job
from pipeline.serve.log_probs import Scorer


@dataclass(eq=False)
class Running:
    """A job in a slot.

    Attributes:
        job: what is wanted.
        slot: where.
        answer: what has come of it.
        pending: tokens of the prompt that the slot does not hold yet.
        scorer: what its text goes through when log probabilities are wanted.
        cached: tokens of the prompt that it held already.
    """

    job: Job
    slot: int
    answer: RunningAnswer
    pending: list[int]
    scorer: Scorer | None = None
    cached: int = 0

    @property
    def can_go_on(self) -> bool:
        """Whether a step would do something for it."""
        if self.job.is_cancelled or self.pending:
            return True
        return self.answer.token is not None and not self.job.outbox.is_full

    def finish(self) -> None:
        """Put into the outbox how the answer ended."""
        if self.scorer is not None:
            self.scorer.finish()
        # A full context is a limit of the length, as OpenAI's interface has it.
        reason = "stop" if self.answer.ending == "stop" else "length"
        self.job.outbox.put(Ending(reason, len(self.answer.ids), self.cached))


def start_job(
    job: Job,
    slot: int,
    max_length: int,
    decoder: Decoder,
    stop_ids: frozenset[int],
    drafter: Drafter | None,
) -> Running:
    """The beginning of an answer, whose text goes to the job's outbox.

    Args:
        job: what is wanted.
        slot: where.
        max_length: tokens that a slot holds.
        decoder: makes text of tokens.
        stop_ids: end an answer, beside those of the job.
        drafter: fresh; None for nothing.
    """
    scorer = None
    if job.alternatives is not None:
        scorer = Scorer(job.outbox.put, decoder, job.alternatives)
    answer = RunningAnswer(
        job.prompt_ids,
        replace(job.decoding, stop_ids=stop_ids.union(job.decoding.stop_ids)),
        max_length,
        decoder,
        drafter,
        job.outbox.put if scorer is None else scorer.emit,
        None if scorer is None else scorer.watch,
        job.constraint,
    )
    return Running(job, slot, answer, list(job.prompt_ids), scorer)


def keep_beginning(session: SlotSession, table: SlotTable, slot: int, length: int) -> int:
    """Leave only the first `length` tokens of a slot; returns how many the session could keep."""
    held = session.slot_length(slot)
    if 0 < length < held:
        session.rewind_slot(slot, length)
        held = session.slot_length(slot)
    # It may have given up tokens by itself, of a slot that was free.
    if not 0 < held <= length:
        session.clear(slot)
        held = 0
    del table.tokens[slot][held:]
    return held


@dataclass(frozen=True)
class Passes:
    """What a step of the scheduler works with: one way of letting all answers go on.

    Attributes:
        session: of the slots.
        table: of what they hold.
        chunk: most tokens of a prompt that a step reads.
        take: lets an answer go on by rows of logits; returns the draft tokens it accepts.
        fail: gives an answer up.
    """

    session: SlotSession
    table: SlotTable
    chunk: int
    take: Callable[[Running, Rows, Sequence[int]], list[int]]
    fail: Callable[[Running, RequestFailure], None]

    def next_chunk(self, running: Running) -> list[int]:
        """What a step reads of a prompt; chunks end at the same places wherever one begins."""
        held = len(self.table.tokens[running.slot])
        return running.pending[: self.chunk - held % self.chunk]

    def take_back(self, running: Running) -> None:
        """Undo what a failed call, or a wrong draft, has appended to a slot beyond the table.

        Raises:
            RuntimeError: the session cannot.
        """
        slot, length = running.slot, len(self.table.tokens[running.slot])
        if self.session.slot_length(slot) != length:
            self.session.rewind_slot(slot, length)
            if self.session.slot_length(slot) != length:
                raise RuntimeError(f"slot {slot} cannot go back to {length} tokens")


class FiniteRows(Sequence[np.ndarray]):
    """Rows of logits, float32 [V], each looked at when it is taken.

    Raises:
        RequestFailure: 500, one holds a NaN, or its largest entry is not finite.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        logits = self._rows[place]
        if not np.isfinite(float(logits.max())):  # NaN if there is one anywhere
            raise RequestFailure.internal(
                "The model's logits are not finite numbers; nothing can be chosen."
            )
        return logits
