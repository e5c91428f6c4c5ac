"""uvicorn's HTTP/1.1 connection with limits it lacks: slow clients, too many, errors as JSON."""

from __future__ import annotations

import asyncio
import http
import json
import select
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serve.failure import RequestFailure

_CONTINUE = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
# After a client ended its side: how long until it is looked at whether it is there, and how often.
_FIRST_LOOK_S, _LOOKS_S = 0.05, 1.0


class LimitedConnection(H11Protocol):
    """A connection that a client cannot hold without using it.

    uvicorn times the pause between two requests alone. Here a request's header, the rest of a body
    that was refused, and the taking of an answer's last bytes have the same limit; the application
    watches over everything between.

    Args:
        timeout_s: longest that the client may take while it is the client's turn.
        max_connections: further ones are turned away with 429.
        **settings: uvicorn's own.
    """

    def __init__(self, *, timeout_s: float, max_connections: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._timeout_s, self._max_connections = timeout_s, max_connections
        self._deadline: asyncio.TimerHandle | None = None
        self._has_begun = self._is_half = False
        # So that the application can drop a client that does not read.
        self.app_state = {**self.app_state, "abort": lambda: self.transport.abort()}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self._refuse(RequestFailure.too_busy(1))
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_clients_turn():
            self._has_begun = False
            self._disarm()
        elif not self._has_begun:  # further bytes of the same header buy no further time
            self._has_begun = True
            self._arm()

    def handle_events(self) -> None:
        """As uvicorn, but empty lines before a request are passed over, as HTTP asks."""
        if self.conn.their_state is h11.IDLE:
            buffer = self.conn._receive_buffer
            content = bytes(buffer)
            buffer.maybe_extract_at_most(len(content) - len(content.lstrip(b"\r\n")))
        super().handle_events()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection of a client that has said all and still waits for its answer.

        One that is gone looks alike, until something is sent: its system then says so.
        """
        if self._is_clients_turn() or self.cycle.more_body or not hasattr(select, "poll"):
            return False
        if not self._is_half:
            self._is_half = True
            is_silent = not self.cycle.response_started
            if is_silent and self.scope["http_version"] == "1.1":
                self.transport.write(self.conn.send(_CONTINUE) or b"")
            self.loop.call_later(_FIRST_LOOK_S, self._look_after_client)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_clients_turn():
            if self._is_half:
                self.transport.close()
            self._has_begun = False
            self._arm()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP."""
        if self.cycle is not None and self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse(RequestFailure(400, msg, code="invalid_http"))

    def timeout_keep_alive_handler(self) -> None:
        """Leave idle connections to the one deadline."""

    def _look_after_client(self) -> None:
        """Give up a client that ended its side because it is gone."""
        if self.transport.is_closing():
            return
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if poll.poll(0):  # an error or a hang-up: these are told unasked
            self.transport.abort()
        else:
            self.loop.call_later(_LOOKS_S, self._look_after_client)

    def _is_clients_turn(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _arm(self) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(self._timeout_s, self._give_up)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        """The client let the time pass."""
        is_in_header = self._has_begun and self.conn.their_state is h11.IDLE
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.transport.abort()  # a close would wait until the client has taken everything
        elif is_in_header and self.conn.our_state is h11.IDLE:
            message = f"The request's header did not come within {self._timeout_s:g} s."
            self._refuse(RequestFailure(408, message, code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, failure: RequestFailure) -> None:
        """Answer without the application, and close."""
        self.transport.write(_as_http(failure))
        self.transport.close()
        self._arm()


def _as_http(failure: RequestFailure) -> bytes:
    """A whole HTTP/1.1 answer, after which the connection closes."""
    body = json.dumps(failure.to_json()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **failure.headers,
    }
    lines = [f"HTTP/1.1 {failure.status} {http.HTTPStatus(failure.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
