"""Several sequences over one model, for any backend.

A session that decodes its rows in one call offers slots of its own; over any other, every slot gets
a cache of its own over the same weights, and slot after slot is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session, SlotSession


class _SlotsOneByOne:
    """Slots over any backend: the weights once, a cache for each slot, one slot after the other.

    Args:
        session: as `open_session` gives it, not used yet.
        slots: how many.

    Raises:
        UsageError: the backend holds one sequence alone.
    """

    def __init__(self, session: Session, slots: int) -> None:
        self.name = session.name
        self.vocab_size = session.vocab_size
        self.max_length = session.max_length
        self.row_cost = session.row_cost
        self._sessions = [session, *(session.sibling() for _ in range(slots - 1))]

    @property
    def slots(self) -> int:
        return len(self._sessions)

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._sessions[slot].forward(input_ids[None], last_only=True)[0, -1]
        return logits.copy()  # so that the logits of all tokens are not kept alive by one row

    def read_block(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._sessions[slot].forward(input_ids[None])[0]
        return logits

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        return np.stack(
            [
                self.prefill(slot, np.array([token], np.int64))
                for slot, token in zip(slots, tokens, strict=True)
            ]
        )

    def slot_length(self, slot: int) -> int:
        return self._sessions[slot].length

    def rewind_slot(self, slot: int, length: int) -> None:
        self._sessions[slot].rewind(length)

    def clear(self, slot: int) -> None:
        self._sessions[slot].reset()


def open_slots(
    folder: Path, backend: str = "auto", threads: int | None = None, slots: int = 1
) -> SlotSession:
    """Open a folder, as `open_session` does, for several sequences at once.

    Raises:
        InputError: the folder is of no kind that can be opened, or does not load.
        UsageError: the backend holds one sequence alone, or another one is meant.
    """
    session = open_session(folder, backend, threads, slots=slots)
    return session if isinstance(session, SlotSession) else _SlotsOneByOne(session, slots)
