"""Several sequences over one model: the interface of a server's scheduler, and one way to it.

`SlotsOneByOne` gives every slot a cache of its own over the same weights and decodes slot after
slot, so it works over any backend. A session that decodes its rows in one call offers the same
interface.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from pipeline.errors import UsageError
from pipeline.runtime.sessions.open_session import folder_kind, open_session
from pipeline.runtime.sessions.session import RewindingSession


@runtime_checkable
class SlotSession(Protocol):
    """A model that answers several sequences at once, each in a slot of its own.

    Attributes:
        name: what reports call this backend.
        vocab_size: width of the logits.
        max_length: most tokens a slot holds, prompt and answer together.
    """

    name: str
    vocab_size: int
    max_length: int

    @property
    def slots(self) -> int:
        """Number of slots."""
        ...

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        """Append int64 [S] to a slot; return float32 [V], the logits of the last token.

        Raises:
            pipeline.errors.InputError: ids outside the vocabulary, or more than `max_length`.
        """
        ...

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each of several different slots; return float32 [len(slots), V].

        When it raises, each of the slots either holds its token or is as it was before.

        Raises:
            pipeline.errors.InputError: ids outside the vocabulary, or a slot that is full.
        """
        ...

    def slot_length(self, slot: int) -> int:
        """Tokens in a slot."""
        ...

    def rewind_slot(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot, or all where that cannot be done.

        `slot_length` tells how many are left.
        """
        ...

    def clear(self, slot: int) -> None:
        """Forget what is in a slot, and whatever a failed call left there."""
        ...


@runtime_checkable
class BlockSlotSession(SlotSession, Protocol):
    """Slots of which one reads several tokens in one call for less than their calls would cost.

    Attributes:
        row_cost: what one more token in a call costs, as a share of a call of one token.
    """

    row_cost: float

    def read_block(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        """Append int64 [S] to a slot; return float32 [S, V], the logits of every token.

        Raises:
            pipeline.errors.InputError: ids outside the vocabulary, or more than `max_length`.
        """
        ...


class SlotsOneByOne:
    """Slots over any backend: the weights once, a cache for each slot, one slot after the other.

    Args:
        session: as `open_session` gives it, not used yet.
        slots: how many.
    """

    def __init__(self, session: RewindingSession, slots: int) -> None:
        self.name = session.name
        self.vocab_size = session.vocab_size
        self.max_length = session.max_length
        self._sessions = [session, *(share_weights(session) for _ in range(slots - 1))]

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self._sessions)

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        """Append int64 [S] to a slot; return float32 [V], the logits of the last token."""
        logits: np.ndarray = self._sessions[slot].forward(input_ids[None], last_only=True)[0, -1]
        return logits.copy()  # so that the logits of all tokens are not kept alive by one row

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Append one token to each of several slots; return float32 [len(slots), V]."""
        return np.stack(
            [
                self.prefill(slot, np.array([token], np.int64))
                for slot, token in zip(slots, tokens, strict=True)
            ]
        )

    def slot_length(self, slot: int) -> int:
        """Tokens in a slot."""
        return self._sessions[slot].length

    def rewind_slot(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""
        self._sessions[slot].rewind(length)

    def clear(self, slot: int) -> None:
        """Forget what is in a slot."""
        self._sessions[slot].reset()


def share_weights(session: RewindingSession) -> RewindingSession:
    """A second session over the same weights, with a cache of its own.

    The sessions of this package make their cache anew at the first call after `reset`, and never
    write into one that they did not make; a copy of a session that was not used yet is therefore a
    session of its own, but for the weights.
    """
    sibling = copy.copy(session)
    sibling.reset()
    return sibling


def open_slots(
    folder: Path, backend: str = "auto", threads: int | None = None, slots: int = 1
) -> SlotSession:
    """Open a folder, as `open_session` does, for several sequences at once.

    Raises:
        InputError: the folder is of no kind that can be opened, or does not load.
        UsageError: the backend cannot take a sequence back, or another one is meant.
    """
    if backend in ("auto", "onnx") and folder_kind(folder) == "onnx":
        from pipeline.export.record import read_export_record

        if read_export_record(folder).traits.contrib:
            from pipeline.runtime.sessions.onnx_cpu_session import CpuSession

            return CpuSession(folder, threads, slots=slots)
    session = open_session(folder, backend, threads)
    if not isinstance(session, RewindingSession):
        raise UsageError(
            "This backend cannot answer several sequences.",
            where=folder,
            observed=session.name,
            change="serve an ONNX export or a checkpoint",
        )
    return SlotsOneByOne(session, slots)
