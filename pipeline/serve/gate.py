"""Who may call: the names that the server goes by, and the origins of web pages that may use it.

Without keys, whoever reaches the server may use it. A web page of anybody reaches a server of the
same machine under a name of its own that resolves to 127.0.0.1 (DNS rebinding), so such a server
answers to names that nobody else can give it.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve.failure import RequestFailure

ANY = "*"
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@?#\[\]\\,]+)(?::\d{0,5})?", re.IGNORECASE)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([^/\s]+)", re.IGNORECASE)
_ABSOLUTE = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE)
_METHODS = "GET, POST"
_PREFLIGHT_S = 600
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Callers:
    """Whom the server answers.

    Attributes:
        hosts: names that it goes by, beside addresses, localhost and those below it; "*" is any.
            None looks at no name, which is safe where a key is needed.
        origins: of web pages that may use it, such as "https://app.example"; "*" is any.
    """

    hosts: frozenset[str] | None = frozenset()
    origins: frozenset[str] = frozenset()

    def allow_host(self, authority: str) -> bool:
        """Whether a request to this name and port is for this server."""
        if self.hosts is None or ANY in self.hosts:
            return True
        name = host_name(authority)
        return name is not None and (_is_own(name) or name in self.hosts)

    def allow_origin(self, origin: str) -> bool:
        """Whether a web page of this origin may use it, and read what it says."""
        return ANY in self.origins or origin.lower() in self.origins

    def allow_caller(self, origin: str) -> bool:
        """Whether a request from a page of this origin, or a local one, is answered at all."""
        if self.hosts is None or self.allow_origin(origin):
            return True
        found = _ORIGIN.fullmatch(origin)
        return found is not None and self.allow_host(found[1])


def host_name(authority: str) -> str | None:
    """The name in `name:port`, in lower case; None when it is none."""
    found = _AUTHORITY.fullmatch(authority.strip())
    return found[1].lower().removesuffix(".") if found else None


def is_origin(text: str) -> bool:
    """Whether it is what browsers send as Origin, or "*"."""
    found = _ORIGIN.fullmatch(text)
    return text in (ANY, "null") or (found is not None and host_name(found[1]) is not None)


def _is_own(name: str) -> bool:
    """Whether nobody can make the name resolve to another's server: an address, or localhost."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class Gate:
    """Lets requests of allowed callers through to the application, and tells browsers so.

    Args:
        app: the application.
        callers: whom it answers.
    """

    def __init__(self, app: ASGIApp, callers: Callers) -> None:
        self._app, self._callers = app, callers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application do it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if self._callers.origins and origin is not None and self._callers.allow_origin(origin):
            send = _allowing(send, origin)
        failure = self._refusal(_addressed(scope), headers)
        if failure is not None:
            answer: ASGIApp = JSONResponse(failure.to_json(), failure.status)
        elif self._callers.origins and _is_preflight(scope, headers):
            answer = _preflight(Request(scope))
        else:
            answer = self._app
        return await answer(scope, receive, send)

    def _refusal(self, authorities: list[str], headers: Headers) -> RequestFailure | None:
        """Why the caller is not answered; None if it is."""
        wrong = next((a for a in authorities if not self._callers.allow_host(a)), None)
        if wrong is not None:
            return RequestFailure(
                403,
                f"This server does not go by the name '{wrong[:_SHOWN_CHARACTERS]}'. "
                "Call it by its address, or start it with --allowed-host NAME.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._callers.allow_caller(origin):
            return RequestFailure(
                403,
                f"Web pages of '{origin[:_SHOWN_CHARACTERS]}' may not use this server. Start it "
                "with --cors-origin ORIGIN to let them.",
                code="origin_not_allowed",
            )
        return None


def _addressed(scope: Scope) -> list[str]:
    """Names that a request calls the server by; a whole URI as its target becomes a path."""
    names = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    whole = _ABSOLUTE.fullmatch(scope["raw_path"].decode("latin-1"))
    if whole is not None:
        names.append(whole[1])
        path = whole[2] or "/"
        scope["path"], scope["raw_path"] = unquote(path), path.encode("latin-1")
    return names or [""]


def _is_preflight(scope: Scope, headers: Headers) -> bool:
    """Whether a browser asks if it may send a page's request."""
    return (
        scope["method"] == "OPTIONS"
        and "origin" in headers
        and "access-control-request-method" in headers
    )


def _preflight(request: Request) -> Response:
    """The answer to a browser; whether it may is said by `_allowing`, for every answer."""
    asked = request.headers
    headers = {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": asked.get("access-control-request-headers", "*"),
        "Access-Control-Max-Age": str(_PREFLIGHT_S),
    }
    if asked.get("access-control-request-private-network") == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=headers)


def _allowing(send: Send, origin: str) -> Send:
    """Answers that pages of an origin may read."""

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "Retry-After"
            headers.add_vary_header("Origin")
        await send(message)

    return tell
