"""The routes of the server, each from a request to an answer in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.runtime.sequence import Decoding
from pipeline.serve.body import BodyReader
from pipeline.serve.failure import RequestFailure
from pipeline.serve.grammar import GrammarMaker
from pipeline.serve.job import Job, Outbox
from pipeline.serve.prompt import PromptReader
from pipeline.serve.reply import Reply
from pipeline.serve.scheduler import Scheduler
from pipeline.serve.schema import Body, ChatRequest, CompletionRequest, Generation
from pipeline.serve.streaming import EventStream, unless_gone

_SEEDS = 2**64
_SHOWN_CHARACTERS = 100
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
        grammars: makes grammars of the forms that answers are to have.
        limits: what a client may ask for.
        keys: accepted API keys; none accepts everybody.
    """

    def __init__(
        self,
        model: str,
        max_length: int,
        scheduler: Scheduler,
        prompts: PromptReader,
        grammars: GrammarMaker,
        limits: Limits,
        keys: tuple[str, ...] = (),
    ) -> None:
        self._model, self._max_length = model, max_length
        self._scheduler, self._prompts, self._limits = scheduler, prompts, limits
        self._bodies = BodyReader(limits.max_body_bytes, limits.client_timeout_s)
        self._grammars = grammars
        self._keys = keys
        self._created = int(time.time())

    def close(self) -> None:
        """Let its threads end."""
        self._bodies.close()
        self._prompts.close()
        self._grammars.close()

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
        closed = "stopping" if self._scheduler.death is None else "failed"
        body = {"status": "ok" if is_open else closed, **asdict(self._scheduler.load())}
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
        return await self._answer(request, wanted, self._prompts.chat_ids(messages), True)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        wanted = await self._read(request, CompletionRequest)
        return await self._answer(request, wanted, self._prompts.ids(wanted.one_prompt()), False)

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        self._authorize(request)
        wanted = await self._bodies.read(request, kind)
        self._require_model(wanted.model)
        return wanted

    async def _answer(
        self,
        request: Request,
        wanted: Generation,
        reading: Coroutine[None, None, list[int]],
        is_chat: bool,
    ) -> Response:
        """Read the prompt, put the jobs into the queue, and give their answers."""
        with contextlib.closing(reading):
            jobs = await self._submit(request, wanted, reading)
        options = wanted.stream_options
        usage = options is not None and options.include_usage
        reply = Reply(self._model, is_chat, len(jobs[0].prompt_ids), usage, wanted.alternatives())
        try:
            if not wanted.stream:
                work = asyncio.gather(*(job.outbox.take_all() for job in jobs))
                return JSONResponse(reply.whole(await unless_gone(work, request.receive)))
            first = await unless_gone(jobs[0].outbox.take_first(), request.receive)
        except BaseException:
            self._cancel(jobs)
            raise
        return EventStream(jobs, first, reply, self._scheduler, self._limits.client_timeout_s)

    async def _submit(
        self, request: Request, wanted: Generation, reading: Coroutine[None, None, list[int]]
    ) -> list[Job]:
        """One job for each answer; they have their places before the prompt is read."""
        most, count = self._most_tokens(wanted), wanted.answers()
        with self._scheduler.places(count) as submit:
            ids = await unless_gone(reading, request.receive)
            making = self._grammars.make(wanted.form())
            grammar = await unless_gone(making, request.receive)
            jobs = [self._job(wanted, ids, most, index) for index in range(count)]
            for job in jobs:
                job.constraint = grammar.copy() if grammar is not None else None
            try:
                for job in jobs:
                    submit(job)
            except BaseException:
                self._cancel(jobs)
                raise
        return jobs

    def _cancel(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._scheduler.cancel(job)

    def _job(self, wanted: Generation, prompt_ids: list[int], most: int, index: int) -> Job:
        seed = secrets.randbelow(_SEEDS) if wanted.seed is None else wanted.seed % _SEEDS
        return Job(
            prompt_ids=prompt_ids,
            decoding=Decoding(
                most,
                wanted.sampling(),
                stops=wanted.stops(),
                seed=(seed, index) if index else seed,  # the first as if it were the only one
            ),
            outbox=Outbox(self._scheduler.wake),
            alternatives=wanted.alternatives(),
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
                f"This server gives at most {limit} tokens of an answer.",
                param="max_tokens" if wanted.max_tokens == asked else "max_completion_tokens",
                code="too_many_tokens",
            )
        usual = (limit, asked or wanted.default_tokens, self._max_length)
        return min(count for count in usual if count is not None)

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
                f"The model '{name[:_SHOWN_CHARACTERS]}' is not served here; '{self._model}' is.",
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


async def _answer_failure(request: Request, failure: RequestFailure) -> Response:
    """A failure that was foreseen."""
    return JSONResponse(failure.to_json(), failure.status, failure.headers)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    """Unknown routes and wrong methods."""
    path = request.scope["path"][:_SHOWN_CHARACTERS]
    messages = {
        404: f"There is nothing at {request.method} {path}.",
        405: f"{path} does not take {request.method}.",
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
