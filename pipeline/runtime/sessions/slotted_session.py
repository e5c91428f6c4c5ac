"""Sequences in rows of one cache: what sessions that read one row at a time have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.runtime.sessions.call_times import CallTimes
from pipeline.runtime.sessions.checks import CheckedSession
from pipeline.runtime.sessions.key_values import KeyValues


class SlottedSession(CheckedSession):
    """A `Session` of rows of equal length, and a `SlotSession` of rows that come and go.

    The two do not mix: `reset` starts the one, `clear` a slot of the other. How tokens are read
    into a row is the subclass's.

    Attributes:
        values: the cache.
        call_times: of the model.
    """

    values: KeyValues
    call_times: CallTimes
    _lengths: np.ndarray  # int64, tokens in each row

    def _read(self, row: int, input_ids: np.ndarray, last_only: bool) -> np.ndarray:
        """Append [S] tokens to a row: logits, float32 [1, S, V] or [1, 1, V]."""
        raise NotImplementedError

    def forward(self, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        """As of a `Session`."""
        raise NotImplementedError

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """As of a `SlotSession`."""
        raise NotImplementedError

    def sibling(self) -> SlottedSession:
        """As of a `Session`."""
        raise NotImplementedError

    @property
    def slots(self) -> int:
        return len(self._lengths)

    # --- Session ---

    def reset(self) -> None:
        """Forget all rows."""
        self._lengths[:] = 0
        self._rows = None

    @property
    def length(self) -> int:
        """Tokens in the cache, in every row that `forward` uses."""
        return int(self._lengths[0])

    def rewind(self, length: int) -> None:
        self._lengths[:] = np.minimum(self._lengths, length)
        if length == 0:
            self._rows = None

    # --- SlotSession ---

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        logits: np.ndarray = self._read_checked(slot, input_ids, last_only=True)[0]
        return logits

    def read_block(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        return self._read_checked(slot, input_ids, last_only=False)

    def rewind_slot(self, slot: int, length: int) -> None:
        self._lengths[slot] = min(int(self._lengths[slot]), length)

    def clear(self, slot: int) -> None:
        self._lengths[slot] = 0

    def slot_length(self, slot: int) -> int:
        return int(self._lengths[slot])

    def take_up(self, slot: int, length: int) -> None:
        """Go on behind the first `length` tokens of a slot, whichever session has read them."""
        if slot >= self.slots:
            self._lengths = np.zeros(self.values.slots, np.int64)
        self._lengths[slot] = length

    def _decode_apart(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """`decode`, slot after slot: float32 [len(slots), V]."""
        ids = np.array(tokens, np.int64)[:, None]
        self._check_tokens(ids)
        for slot in slots:
            self._check_room(int(self._lengths[slot]), 1)
        return np.concatenate(
            [self._read(s, row, True)[0] for s, row in zip(slots, ids, strict=True)]
        )

    def _read_checked(self, slot: int, input_ids: np.ndarray, last_only: bool) -> np.ndarray:
        """Append [S] tokens to a slot, unless there is something wrong: [S, V] or [1, V]."""
        self._check_tokens(input_ids[None])
        self._check_room(int(self._lengths[slot]), len(input_ids))
        return self._read(slot, input_ids, last_only)[0]

    def _grow(self, slots: int) -> None:
        """More rows, the present ones kept."""
        lengths = self._lengths
        self.values.grow(slots, int(lengths.max()))
        self._lengths = np.zeros(slots, np.int64)
        self._lengths[: len(lengths)] = lengths
