"""The routes of the server, each from a request to an answer in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from dataclasses import asdict, dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.runtime.sequence import Decoding
from pipeline.serve.failure import RequestFailure
from pipeline.serve.job import Job, Outbox
from pipeline.serve.prompt import PromptReader
from pipeline.serve.reply import Reply
from pipeline.serve.scheduler import Scheduler
from pipeline.serve.schema import Body, ChatRequest, CompletionRequest, Generation
from pipeline.serve.streaming import EventStream, unless_gone

# So much of a body that is too long is still read, and dropped: closing while a client writes would
# reset the connection, and most clients would then not see why.
_DRAINED_BODIES = 8
_SEEDS = 2**64
_GONE = 499  # as nginx calls a client that left; nobody reads it


@dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
        max_body_bytes: longest body of a request.
        max_new_tokens: most tokens of an answer; None leaves it to the context.
        client_timeout_s: longest that a client may take to send a request, to take what was sent,
            or to say nothing between two requests.
    """

    max_body_bytes: int = 1 << 20
    max_new_tokens: int | None = None
    client_timeout_s: float = 30.0


class Api:
    """The endpoints over one model.

    Args:
        model: the name that requests must give.
        max_length: tokens that the context holds.
        scheduler: runs the model.
        prompts: makes ids of prompts.
        limits: what a client may ask for.
        keys: accepted API keys; none accepts everybody.
    """

    def __init__(
        self,
        model: str,
        max_length: int,
        scheduler: Scheduler,
        prompts: PromptReader,
        limits: Limits,
        keys: tuple[str, ...] = (),
    ) -> None:
        self._model, self._max_length = model, max_length
        self._scheduler, self._prompts, self._limits = scheduler, prompts, limits
        self._keys = keys
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self.health, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{model:path}", self.model, methods=["GET"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        handlers = {
            RequestFailure: _answer_failure,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_defect,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
        app.router.redirect_slashes = False
        return app

    async def health(self, request: Request) -> Response:
        """Whether jobs are taken, and how busy it is; needs no key."""
        is_open = self._scheduler.is_open
        body = {"status": "ok" if is_open else "stopping", **asdict(self._scheduler.load())}
        return JSONResponse(body, 200 if is_open else 503)

    async def models(self, request: Request) -> Response:
        """The one model."""
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """The one model, by name."""
        self._authorize(request)
        self._require_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        wanted = await self._read(request, ChatRequest)
        messages = [message.to_message() for message in wanted.messages]
        return await self._answer(request, wanted, await self._prompts.chat_ids(messages), True)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        wanted = await self._read(request, CompletionRequest)
        prompt = wanted.one_prompt()
        if isinstance(prompt, str):
            ids = await self._prompts.text_ids(prompt)
        else:
            ids = self._prompts.given_ids(prompt)
        return await self._answer(request, wanted, ids, False)

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        self._authorize(request)
        limits = self._limits
        body = await _read_body(request, limits.max_body_bytes, limits.client_timeout_s)
        wanted = kind.from_body(body)
        self._require_model(wanted.model)
        return wanted

    async def _answer(
        self, request: Request, wanted: Generation, prompt_ids: list[int], is_chat: bool
    ) -> Response:
        """Put the job into the queue, and give its answer whole or as it comes."""
        job = self._job(wanted, prompt_ids)
        options = wanted.stream_options
        usage = options is not None and options.include_usage
        reply = Reply(self._model, is_chat, len(prompt_ids), usage)
        self._scheduler.submit(job)
        try:
            if not wanted.stream:
                text, ending = await unless_gone(job.outbox.take_all(), request.receive)
                return JSONResponse(reply.whole(text, ending))
            first = await unless_gone(job.outbox.take_first(), request.receive)
        except BaseException:
            self._scheduler.cancel(job)
            raise
        timeout_s = self._limits.client_timeout_s
        return EventStream(job, first, reply, self._scheduler, timeout_s)

    def _job(self, wanted: Generation, prompt_ids: list[int]) -> Job:
        seed = secrets.randbelow(_SEEDS) if wanted.seed is None else wanted.seed % _SEEDS
        return Job(
            prompt_ids=prompt_ids,
            decoding=Decoding(
                self._most_tokens(wanted), wanted.sampling(), stops=wanted.stops(), seed=seed
            ),
            outbox=Outbox(self._scheduler.wake),
        )

    def _most_tokens(self, wanted: Generation) -> int:
        """Most tokens of the answer.

        Raises:
            RequestFailure: more than this server gives.
        """
        limit, asked = self._limits.max_new_tokens, wanted.wanted_tokens()
        if limit is not None and asked is not None and asked > limit:
            raise RequestFailure(
                400,
                f"This server gives at most {limit} tokens of an answer; {asked} were asked for.",
                param="max_tokens" if wanted.max_tokens == asked else "max_completion_tokens",
                code="too_many_tokens",
            )
        usual = (limit, wanted.default_tokens, self._max_length)
        return asked or min(count for count in usual if count is not None)

    def _authorize(self, request: Request) -> None:
        """Raise RequestFailure unless the request has one of the keys."""
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Every key is compared, in constant time: how long it takes tells nothing about them.
        matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise RequestFailure(
                401,
                "Give an API key as 'Authorization: Bearer KEY'.",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _require_model(self, name: str) -> None:
        if name != self._model:
            raise RequestFailure(
                404,
                f"The model '{name}' is not served here; '{self._model}' is.",
                param="model",
                code="model_not_found",
            )

    def _card(self) -> dict[str, object]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "skipcat",
            "max_model_len": self._max_length,
        }


async def _read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
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


async def _answer_failure(request: Request, failure: RequestFailure) -> Response:
    """A failure that was foreseen."""
    return JSONResponse(failure.to_json(), failure.status, failure.headers)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Unknown routes and wrong methods."""
    messages = {
        404: f"There is nothing at {request.method} {request.url.path}.",
        405: f"{request.url.path} does not take {request.method}.",
    }
    message = messages.get(error.status_code, error.detail)
    codes = {404: "not_found", 405: "method_not_allowed"}
    failure = RequestFailure(
        error.status_code,
        message,
        code=codes.get(error.status_code),
        headers=dict(error.headers or {}),
    )
    return await _answer_failure(request, failure)


async def _answer_nobody(request: Request, error: ClientDisconnect) -> Response:
    """The client left before its answer was ready."""
    return Response(status_code=_GONE)


async def _answer_defect(request: Request, error: Exception) -> Response:
    """Anything else is a defect of this server; the traceback goes to its log."""
    return await _answer_failure(
        request, RequestFailure.internal("Internal error; the server's log says more.")
    )
