"""What stands in a cache, so that a prompt reads only what is new: of a session, and of slots."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np

from pipeline.errors import UsageError
from pipeline.runtime.draft_tree import branches_of, parents_in_block
from pipeline.runtime.sessions.session import Block, BlockSession, Session


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    shorter = min(len(first), len(second))
    if list(first[:shorter]) == list(second[:shorter]):
        return shorter
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def _kept_tokens(shared: int, length: int, chunk: int) -> int:
    """How many of the tokens that a cache shares with a prompt are not read again.

    All, but where a single token would be left to read of a chunk of several: one alone is summed
    in another order, and the same prompt should give the same answer twice.

    Args:
        shared: common beginning, without the prompt's last token, whose logits are wanted.
        length: of the prompt.
        chunk: most tokens of a prompt that one call reads; calls end at multiples of it.
    """
    end = min(length, (shared // chunk + 1) * chunk)
    return shared - 1 if end - shared == 1 and shared % chunk else shared


class _Turns:
    """Who uses a session: one answer at a time, whichever objects hold the session."""

    _SECONDS_BETWEEN_LOOKS = 0.05

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams = False
        self._thread: int | None = None
        # Whose tokens the session holds.
        self.cache: weakref.ref[PrefixCache] | None = None

    @contextlib.contextmanager
    def one(self, streams: bool) -> Iterator[None]:
        """Use the session for the block; a whole answer of another thread is waited for."""
        while not self._lock.acquire(timeout=self._SECONDS_BETWEEN_LOOKS):
            # Nobody can say when a stream will be read on; this thread's own would never be.
            if self._streams or self._thread == threading.get_ident():
                raise UsageError(
                    "This model is in use: it gives one answer at a time.",
                    observed="an answer that has not come to its end",
                    change="read or close() the other stream first, or open the model twice",
                )
        try:
            self._streams, self._thread = streams, threading.get_ident()
            yield
        finally:
            self._streams, self._thread = False, None
            self._lock.release()


_TURNS: weakref.WeakKeyDictionary[Session, _Turns] = weakref.WeakKeyDictionary()


class PrefixCache:
    """A session of one sequence, and the tokens it has read.

    Args:
        session: used by nothing else.

    Attributes:
        max_length: most tokens of the cache.

    Raises:
        UsageError: another answer of the session has not come to its end.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.max_length = session.max_length
        self._ids: list[int] = []
        self._turns = _TURNS.setdefault(session, _Turns())
        with self.turn(streams=False):
            session.reset()

    def turn(self, streams: bool) -> contextlib.AbstractContextManager[None]:
        """What an answer holds while it is made.

        Args:
            streams: whether somebody else decides when it goes on.

        Raises:
            UsageError: on entering; a stream, or another answer of this thread, is not at its end.
        """
        return self._turns.one(streams)

    def begin(self, prompt_ids: Sequence[int]) -> list[int]:
        """Keep what the cache and a prompt have in common; return the rest, at least one token."""
        length = len(prompt_ids)  # all of it goes into one call
        if self._turns.cache is None or self._turns.cache() is not self:
            self._ids = []  # another cache has had the session since
            self._turns.cache = weakref.ref(self)
        kept = _kept_tokens(common_length(self._ids, prompt_ids[:-1]), length, length)
        self._ids = []  # until the session has done what is asked of it
        if kept:
            self.session.rewind(kept)
            kept = self.session.length
        else:
            self.session.reset()
        self._ids = list(prompt_ids[:kept])
        return list(prompt_ids[kept:])

    def read(self, new_ids: Sequence[int], drafted: Sequence[int] = ()) -> np.ndarray:
        """Append tokens, and draft tokens behind them.

        Args:
            new_ids: at least one token.
            drafted: what may come next; it branches where the session reads blocks alone, and is
                then read behind one token.

        Returns:
            float32 [1 + len(drafted), V], the logits of the last token and of every draft token.

        Raises:
            InputError: more tokens than the cache holds, or ids outside the vocabulary.
        """
        known = self._ids
        self._ids = []  # whatever is in the cache after a failure is not to be built on
        block = np.array([[*new_ids, *drafted]], dtype=np.int64)
        if rows := parents_in_block(drafted):
            assert isinstance(self.session, BlockSession)
            logits = self.session.read_blocks([Block(0, block[0], parents=rows)])[0]
            self._ids = [*known, *new_ids, *drafted[: len(branches_of(rows)[0]) - 1]]
            return logits
        logits = self.session.forward(block, last_only=not drafted)[0, -1 - len(drafted) :]
        self._ids = [*known, *new_ids, *drafted]
        return logits

    def keep(self, drafted: Sequence[int], path: Sequence[int]) -> None:
        """Of the draft tokens that were just read, forget all but those of a path.

        Args:
            drafted: as of `read`.
            path: numbers of draft tokens, one behind another.

        Raises:
            RuntimeError: the session cannot.
        """
        rows = parents_in_block(drafted)
        if rows is None:
            self.drop(len(drafted) - len(path))
            return
        assert isinstance(self.session, BlockSession)
        known, self._ids = self._ids[: 1 - len(branches_of(rows)[0])], []
        self.session.keep_path(0, [1 + n for n in path])
        self._ids = [*known, *(drafted[n] for n in path)]

    def drop(self, tokens: int) -> None:
        """Forget the last tokens: draft tokens that were not accepted.

        Raises:
            RuntimeError: the session cannot.
        """
        if tokens == 0:
            return
        known, self._ids = self._ids[:-tokens], []
        self.session.rewind(len(known))
        if self.session.length != len(known):
            raise RuntimeError(f"{self.session.name} cannot go back to {len(known)} tokens")
        self._ids = known


class SlotTable:
    """Tokens of every slot, and which slots are free.

    Args:
        slots: how many there are; all begin free and empty.
    """

    def __init__(self, slots: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(slots)]
        self._clock = count(1)
        # Slot -> when it was freed.
        self._free = dict.fromkeys(range(slots), 0)

    @property
    def free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def take(self, prompt_ids: Sequence[int], chunk: int, reuse: bool = True) -> tuple[int, int]:
        """Occupy the free slot that shares the longest beginning with a prompt.

        Of equal ones it is the one that has been free longest, whose tokens are the least likely
        to be wanted again.

        Args:
            prompt_ids: at least one token.
            chunk: most tokens of a prompt that one call reads.
            reuse: whether to look at what the slots hold.

        Returns:
            The slot, and how many of its first tokens the prompt need not read again.

        Raises:
            LookupError: no slot is free.
        """
        if not self._free:
            raise LookupError("no slot is free")
        shared = {
            slot: common_length(self.tokens[slot], prompt_ids[:-1]) if reuse else 0
            for slot in self._free
        }
        slot = min(self._free, key=lambda slot: (-shared[slot], self._free[slot], slot))
        del self._free[slot]
        return slot, _kept_tokens(shared[slot], len(prompt_ids), chunk)

    def release(self, slot: int) -> None:
        """Free a slot; what it holds may be of use to a later prompt."""
        self._free[slot] = next(self._clock)
