"""The server as a whole: opens the model, listens, and ends in order when it is told to."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import math
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from pipeline.errors import UsageError
from pipeline.progress import note
from pipeline.runtime.drafting import PROMPT_LOOKUP, DraftSource
from pipeline.runtime.open_answering import open_answering
from pipeline.runtime.sessions.session import SlotSession
from pipeline.runtime.tokenizer import load_tokenizer, start_template, stop_token_ids
from pipeline.serve.app import Api, Limits
from pipeline.serve.connection import LimitedConnection
from pipeline.serve.gate import Callers, Gate, host_name
from pipeline.serve.grammar import GrammarMaker
from pipeline.serve.prompt import PromptReader
from pipeline.serve.scheduler import PREFILL_CHUNK, Scheduler

# Below the 1024 files that most systems let a process open.
_MAX_CONNECTIONS = 512
# For the last events of the streams that were ended, after the grace period.
_FLUSH_S = 2.0


@dataclass(frozen=True)
class ServeRequest:
    """What to serve, where, and within which limits.

    Attributes:
        folder: an ONNX export or a checkpoint.
        backend: `auto`, `torch` or `onnx`.
        threads: of ONNX Runtime; None takes one to a physical core.
        host: address to listen at.
        port: 0 takes a free one.
        model_name: that requests must give; None is the folder's name.
        slots: sequences that are answered at the same time.
        queue: requests that may wait for a slot.
        prefill_chunk: most tokens of a prompt between two tokens of the other answers.
        reuse: whether prompts may go on from what a slot holds.
        lookup: whether an answer that runs alone reads draft tokens, by prompt lookup.
        draft: a folder whose model drafts for every answer, or None.
        memory: bytes that a checkpoint may take, such as "1GB"; None for all.
        limits: what a client may ask for.
        keys: accepted API keys; none accepts everybody.
        grace_s: how long running answers may take after the signal to stop.
        allowed_hosts: names that it goes by, beside `host`, addresses and localhost; "*" is any.
            With keys and without such names it goes by any.
        cors_origins: of web pages that may use it; "*" is any.
    """

    folder: Path
    backend: str = "auto"
    threads: int | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    slots: int = 4
    queue: int = 64
    prefill_chunk: int = PREFILL_CHUNK
    reuse: bool = True
    lookup: bool = False
    draft: Path | None = None
    memory: str | None = None
    limits: Limits = field(default_factory=Limits)
    keys: tuple[str, ...] = ()
    grace_s: float = 10.0
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()


class _Server(uvicorn.Server):
    """The server of uvicorn, which ends the running answers before it closes.

    Args:
        config: uvicorn's.
        scheduler: whose answers they are.
        grace_s: how long they may still take.

    Attributes:
        ended_by: the signal that ended it, if one did.
        scheduler: as given.
    """

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, grace_s: float) -> None:
        super().__init__(config)
        self.ended_by: int | None = None
        self.scheduler, self._grace_s = scheduler, grace_s
        scheduler.on_death(self._end)

    def _end(self) -> None:
        """End, from another thread."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, end what runs, close."""
        self.scheduler.drain(self._grace_s)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but without raising the signal anew: a stop that was asked for is none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._on_signal) for number in _uvicorn_signals()}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.ended_by = number
        self.handle_exit(number, frame)


def _uvicorn_signals() -> tuple[int, ...]:
    """Signals that end the server."""
    return signal.SIGINT, signal.SIGTERM


def serve(request: ServeRequest) -> int:
    """Serve until a signal comes.

    Returns:
        Exit status: 0, 130 after Ctrl-C, or 1 when the thread that runs the model failed.

    Raises:
        InputError: the folder does not load.
        UsageError: the address cannot be listened at.
    """
    with _listen(request.host, request.port) as listener:
        place = request.backend, request.threads, request.slots, request.lookup, request.memory
        session, source = open_answering(request.folder, request.draft, *place)
        with _running_server(request, session, source) as server:
            listener.listen()  # whoever reads the address may call it at once
            _announce(request, session, listener)
            server.run(sockets=[listener])
            death = server.scheduler.death
    if death is not None:
        note(f"error: the thread that runs the model has failed: {type(death).__name__}")
        return 1
    note("stopped")
    return 130 if server.ended_by == signal.SIGINT else 0


@contextlib.contextmanager
def _running_server(
    request: ServeRequest, session: SlotSession, source: DraftSource | None = None
) -> Iterator[_Server]:
    """A server over a session, whose threads end with the block."""
    tokenizer = load_tokenizer(request.folder)
    start_template(tokenizer)
    stop_ids = stop_token_ids(tokenizer, request.folder)
    scheduler = Scheduler(
        session,
        load_tokenizer(request.folder),  # one for each thread
        stop_ids,
        queue=request.queue,
        prefill_chunk=request.prefill_chunk,
        reuse=request.reuse,
        drafter=source or _by_lookup(request),
    )
    # transformers' tokenizers change while they are used: one for each thread.
    is_shareable = getattr(tokenizer, "is_shareable", False)
    second = tokenizer if is_shareable else load_tokenizer(request.folder)
    prompts = PromptReader(tokenizer, second, session.vocab_size, session.max_length)
    name = _served_name(request)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    grammars = GrammarMaker(backend, session.vocab_size, stop_ids)
    api = Api(name, session.max_length, scheduler, prompts, grammars, request.limits, request.keys)
    try:
        yield _Server(_configure(request, api), scheduler, request.grace_s)
    finally:
        scheduler.close()
        api.close()


def _by_lookup(request: ServeRequest) -> str | None:
    return PROMPT_LOOKUP if request.lookup and request.draft is None else None


def _configure(request: ServeRequest, api: Api) -> uvicorn.Config:
    """The settings of uvicorn."""
    connection = functools.partial(
        LimitedConnection,
        timeout_s=request.limits.client_timeout_s,
        max_connections=_MAX_CONNECTIONS,
    )
    return uvicorn.Config(
        Gate(api.app(), _callers(request)),
        http=connection,  # type: ignore[arg-type] # called like the class, never subclassed
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=logging.getLogger().isEnabledFor(logging.INFO),
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(request.grace_s + _FLUSH_S),
    )


def _callers(request: ServeRequest) -> Callers:
    """Whom the server answers."""
    named = (host_name(name) for name in (*request.allowed_hosts, request.host))
    hosts = frozenset(name for name in named if name is not None)
    looks_at_names = not request.keys or request.allowed_hosts
    origins = frozenset(origin.lower() for origin in request.cors_origins)
    return Callers(hosts if looks_at_names else None, origins)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound before the model loads, so that a port in use is told at once.

    Raises:
        UsageError: the address is not one of this machine, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UsageError(
            "This address cannot be listened at.",
            where=f"{host}:{port}",
            observed=error.strerror or error,
            change="pass another --host or --port",
        ) from error
    return listener


def _announce(request: ServeRequest, session: SlotSession, listener: socket.socket) -> None:
    """Say what is served where, and to whom."""
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        keys = "with an API key" if request.keys else "without any key: see --api-key-file"
        note(f"warning: {host} is open to other machines, unencrypted, {keys}")
    note(
        f"serving {_served_name(request)} ({session.name}, {session.slots} slots, "
        f"{session.max_length} tokens of context) at http://{address}:{port}/v1"
    )


def _served_name(request: ServeRequest) -> str:
    """The name that requests must give."""
    return request.model_name or request.folder.resolve().name
