"""Between a client and its answer: time-outs, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pipeline.serve.failure import RequestFailure
from pipeline.serve.job import Ending, Job, Piece
from pipeline.serve.reply import Reply
from pipeline.serve.scheduler import Scheduler

_Result = TypeVar("_Result")

_EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def unless_gone(work: Awaitable[_Result], receive: Receive) -> _Result:
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
    """The answers to a request, sent as they come.

    Args:
        jobs: in the scheduler; cancelled whenever this ends before the answers do.
        first: pieces of the first that were taken already, so that a failure before them has its
            HTTP status.
        reply: makes events of them.
        scheduler: whose jobs they are.
        timeout_s: longest that the client may take to make room for more.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        first: list[Piece],
        reply: Reply,
        scheduler: Scheduler,
        timeout_s: float,
    ) -> None:
        super().__init__(headers=_EVENT_HEADERS)
        del self.headers["content-length"]
        self._jobs, self._first, self._reply = jobs, first, reply
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
            for job in self._jobs:
                self._scheduler.cancel(job)

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await self._send(send, start)
        work = [
            asyncio.ensure_future(self._send_answer(send, index, job))
            for index, job in enumerate(self._jobs)
        ]
        try:
            last = self._reply.end(await asyncio.gather(*work))
        except RequestFailure as failure:
            last = self._reply.broken_off(failure)
        finally:
            for task in work:
                task.cancel()
        await self._send_events(send, last, more=False)

    async def _send_answer(self, send: Send, index: int, job: Job) -> Ending:
        """Send one of the answers, whatever the others do.

        Raises:
            RequestFailure: it failed.
            TimeoutError: the client does not read.
        """
        pieces = [] if index else self._first
        events, offset = self._reply.opening(index), 0
        while True:
            for piece in pieces:
                if isinstance(piece, RequestFailure):
                    await self._send_events(send, events)
                    raise piece
                if isinstance(piece, Ending):
                    await self._send_events(send, events + self._reply.closing(index, piece))
                    return piece
                events += self._reply.piece(index, piece, offset)
                offset += len(piece if isinstance(piece, str) else piece.text)
            await self._send_events(send, events)
            pieces, events = await job.outbox.take(), b""

    async def _send_events(self, send: Send, events: bytes, more: bool = True) -> None:
        await self._send(send, {"type": "http.response.body", "body": events, "more_body": more})

    async def _send(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._timeout_s):
            await send(message)
