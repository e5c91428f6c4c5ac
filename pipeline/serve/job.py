"""What the scheduler is asked for, and the bounded box its answer travels through."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.runtime.sequence import Constraint, Decoding
from pipeline.serve.failure import RequestFailure
from pipeline.serve.log_probs import ScoredText

# Pieces of text, each of a token or a few, that may wait for a reader before its slot pauses.
_OUTBOX_PIECES = 64


@dataclass(frozen=True)
class Ending:
    """How an answer ended.

    Attributes:
        reason: `stop` or `length`, as OpenAI calls them.
        completion_tokens: tokens of the answer, without the one that ended it.
        cached_tokens: tokens of the prompt that were in the cache already.
    """

    reason: str
    completion_tokens: int
    cached_tokens: int


Piece = str | ScoredText | Ending | RequestFailure


class Outbox:
    """Pieces of an answer: one thread puts them in, one coroutine takes them out.

    It holds a bounded number: the scheduler looks at `is_full` and leaves the slot alone until
    there is room, so a slow reader costs neither memory nor other readers' time.

    Args:
        on_room: called, from the event loop, when a full box was emptied.
    """

    def __init__(self, on_room: Callable[[], None], capacity: int = _OUTBOX_PIECES) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._on_room = on_room
        self._capacity = capacity
        self._lock = threading.Lock()
        self._pieces: deque[Piece] = deque()

    @property
    def is_full(self) -> bool:
        """Whether no further text should be put in; an end always may."""
        return self.room == 0

    @property
    def room(self) -> int:
        """How many pieces of text should be put in at most."""
        return max(0, self._capacity - len(self._pieces))

    def put(self, piece: Piece) -> None:
        """Add a piece; from any thread, and without waiting."""
        with self._lock:
            was_empty = not self._pieces
            self._pieces.append(piece)
        if was_empty:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody reads
                self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self) -> list[Piece]:
        """Wait for pieces; take all there are."""
        while not self._pieces:
            self._ready.clear()
            if not self._pieces:
                await self._ready.wait()
        with self._lock:
            pieces = list(self._pieces)
            self._pieces.clear()
        if len(pieces) >= self._capacity:
            self._on_room()
        return pieces

    async def take_first(self) -> list[Piece]:
        """The beginning of an answer.

        Raises:
            RequestFailure: it failed before it began.
        """
        pieces = await self.take()
        if isinstance(pieces[0], RequestFailure):
            raise pieces[0]
        return pieces

    async def take_all(self) -> tuple[ScoredText, Ending]:
        """The whole text of an answer, and how it ended.

        Raises:
            RequestFailure: it failed.
        """
        whole = ScoredText("")
        texts: list[str] = []
        while True:
            for piece in await self.take():
                if isinstance(piece, RequestFailure):
                    raise piece
                if isinstance(piece, Ending):
                    return ScoredText("".join(texts), whole.scores), piece
                if isinstance(piece, ScoredText):
                    whole.scores.extend(piece.scores)
                texts.append(piece if isinstance(piece, str) else piece.text)


@dataclass(eq=False)
class Job:
    """One answer that is wanted.

    Attributes:
        prompt_ids: at least one token, at most as many as a slot holds.
        decoding: how it is made; the model's own stop tokens end it, too.
        outbox: where the answer goes.
        alternatives: of how many of the likeliest tokens the log probability goes with each token;
            None for text alone.
        constraint: the form that the answer has; None for any.
        is_cancelled: nobody waits for the answer any more; set through `Scheduler.cancel`.
    """

    prompt_ids: list[int]
    decoding: Decoding
    outbox: Outbox
    alternatives: int | None = None
    constraint: Constraint | None = None
    is_cancelled: bool = field(default=False, init=False)


@dataclass(frozen=True)
class Load:
    """How busy the scheduler is: answers in slots, requests waiting, and the limits of both."""

    running: int
    waiting: int
    slots: int
    queue: int
