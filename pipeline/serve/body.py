"""The body of a request: taken within limits, looked at, and read off the event loop."""

from __future__ import annotations

import asyncio
import re

from starlette.requests import Request

from pipeline.serve.failure import RequestFailure
from pipeline.serve.schema import Body
from pipeline.serve.worker import Worker

# So much of a body that is too long is still read, and dropped: closing while a client writes would
# reset the connection, and most clients would then not see why.
_DRAINED_BODIES = 8
# A list, an object or a field costs a reader tens of times its bytes, in memory and in time. No
# conversation has as many; numbers, as in a prompt of token ids, are cheap, and not counted.
_MOST_PARTS = 20_000
_PARTS = (b"[", b"{", b":")
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
# What is shorter is read in a millisecond, and must not wait for what is long.
_SMALL_BYTES = 16 << 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BodyReader:
    """Takes bodies and reads them; long ones one at a time, in a thread of its own.

    Args:
        max_bytes: longest body.
        timeout_s: longest that a client may take to send it.
    """

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._worker = Worker("bodies")

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The request that a body holds.

        Raises:
            RequestFailure: 415 not called JSON, 413 too long, 408 too slow, 400 wrong.
            ClientDisconnect: the client is gone.
        """
        _require_json(request)
        body = (await self._take(request)).removeprefix(_BYTE_ORDER_MARK)
        if len(body) <= _SMALL_BYTES:
            return _read(body, kind)
        return await self._worker.run(lambda: _read(body, kind))

    def close(self) -> None:
        """Let the thread end."""
        self._worker.close()

    async def _take(self, request: Request) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await _collect(request, self._max_bytes)
        except TimeoutError as error:
            raise RequestFailure(
                408,
                f"The body did not come within {self._timeout_s:g} s.",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from error
        if body is None:
            raise RequestFailure(
                413,
                f"The body is longer than {self._max_bytes} bytes.",
                code="body_too_large",
                headers={"Connection": "close"},
            )
        return body


def _require_json(request: Request) -> None:
    """Raise RequestFailure for a body that says it is not plain UTF-8 JSON."""
    kind, _, settings = request.headers.get("content-type", "").partition(";")
    named = re.search(r'charset\s*=\s*"?([^\s";]*)', settings, re.IGNORECASE)
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if kind.strip().lower() != "application/json":
        wrong = f"as Content-Type: application/json, not '{kind.strip()[:100]}'"
    elif named and named[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        wrong = f"in UTF-8, not in '{named[1][:100]}'"
    elif coding not in ("", "identity"):
        wrong = f"as it is, without Content-Encoding: {coding[:100]}"
    else:
        return
    raise RequestFailure(415, f"The body must be sent {wrong}.", code="unsupported_media_type")


async def _collect(request: Request, max_bytes: int) -> bytes | None:
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


def _read(body: bytes, kind: type[Body]) -> Body:
    """Look at what a body is made of before anything is made of it, and read it."""
    if sum(map(body.count, _PARTS)) > _MOST_PARTS:  # or it is text that holds such letters
        outside_strings = _STRING.sub(b"", body)
        if sum(map(outside_strings.count, _PARTS)) > _MOST_PARTS:
            raise RequestFailure(
                400,
                f"The body has more than {_MOST_PARTS} lists, objects and fields.",
                code="invalid_value",
            )
    return kind.from_body(body)
