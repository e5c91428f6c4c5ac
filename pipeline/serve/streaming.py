"""Between a client and its answer: time-outs, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pipeline.serve.job import Ending, Job, Piece
from pipeline.serve.reply import Reply
from pipeline.serve.scheduler import Scheduler

_Result = TypeVar("_Result")

_EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def unless_gone(work: Coroutine[Any, Any, _Result], receive: Receive) -> _Result:
    """Do some work, but stop when the client disconnects.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer sent as it comes.

    Args:
        job: in the scheduler; cancelled whenever this ends before the answer does.
        first: pieces that were taken already, so that a failure before them has its HTTP status.
        reply: makes events of them.
        scheduler: whose job it is.
        timeout_s: longest that the client may take to make room for more.
    """

    def __init__(
        self, job: Job, first: list[Piece], reply: Reply, scheduler: Scheduler, timeout_s: float
    ) -> None:
        super().__init__(headers=_EVENT_HEADERS)
        del self.headers["content-length"]
        self._job, self._first, self._reply = job, first, reply
        self._scheduler, self._timeout_s = scheduler, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client is gone or does not read."""
        try:
            await unless_gone(self._send_all(send), receive)
        except ClientDisconnect:
            pass
        except TimeoutError:
            # What is buffered would never be taken: closing must not wait for it.
            scope["state"]["abort"]()
            await _until_gone(receive)
        finally:
            self._scheduler.cancel(self._job)

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        pieces, opening, is_over = self._first, self._reply.opening(), False
        while not is_over:
            events = opening + b"".join(self._event(piece) for piece in pieces)
            is_over = any(not isinstance(piece, str) for piece in pieces)
            body = {"type": "http.response.body", "body": events, "more_body": not is_over}
            await self._send(send, body)
            pieces, opening = [] if is_over else await self._job.outbox.take(), b""

    async def _send(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._timeout_s):
            await send(message)

    def _event(self, piece: Piece) -> bytes:
        if isinstance(piece, str):
            return self._reply.piece(piece)
        if isinstance(piece, Ending):
            return self._reply.closing(piece)
        return self._reply.broken_off(piece)
