"""Between a client and its answer: bodies with a limit, time-outs, and clients that go away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pipeline.serve.failure import RequestFailure
from pipeline.serve.job import Ending, Job, Outbox, Piece
from pipeline.serve.reply import Reply, broken_off
from pipeline.serve.scheduler import Scheduler

_Result = TypeVar("_Result")

# So much of a body that is too long is still read, and dropped: closing while a client writes would
# reset the connection, and most clients would then not see why.
_DRAINED_BODIES = 8
_EVENT_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The JSON body of a request, of at most `max_bytes`.

    Raises:
        RequestFailure: 415 not called JSON, 413 too long, 408 too slow.
        ClientDisconnect: the client is gone.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RequestFailure(
            415,
            f"The body must be sent as Content-Type: application/json, not '{kind}'.",
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(timeout_s):
            body = await _collect_body(request, max_bytes)
    except TimeoutError as error:
        raise RequestFailure(
            408,
            f"The body did not come within {timeout_s:g} s.",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from error
    if body is None:
        raise RequestFailure(
            413,
            f"The body is longer than {max_bytes} bytes.",
            code="body_too_large",
            headers={"Connection": "close"},
        )
    return body


async def _collect_body(request: Request, max_bytes: int) -> bytes | None:
    """The body, or None when it is longer than `max_bytes`; never holds more than that."""
    announced = request.headers.get("content-length", "0")
    is_too_long = int(announced) > max_bytes
    if is_too_long and "expect" in request.headers:
        return None  # the client waits for leave to send it
    body = bytearray()
    seen_bytes = 0
    async for part in request.stream():
        seen_bytes += len(part)
        if seen_bytes > max_bytes:
            is_too_long = True
            body.clear()
        if not is_too_long:
            body += part
        elif seen_bytes > _DRAINED_BODIES * max_bytes:
            break
    return None if is_too_long else bytes(body)


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


async def collect_answer(outbox: Outbox) -> tuple[str, Ending]:
    """The whole text of an answer, and how it ended.

    Raises:
        RequestFailure: it failed.
    """
    texts: list[str] = []
    while True:
        for piece in await outbox.take():
            if isinstance(piece, RequestFailure):
                raise piece
            if isinstance(piece, Ending):
                return "".join(texts), piece
            texts.append(piece)


async def first_pieces(outbox: Outbox) -> list[Piece]:
    """The beginning of an answer.

    Raises:
        RequestFailure: it failed before it began.
    """
    pieces = await outbox.take()
    if isinstance(pieces[0], RequestFailure):
        raise pieces[0]
    return pieces


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
        return broken_off(piece)
