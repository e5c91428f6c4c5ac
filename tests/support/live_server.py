"""A server on a free port of this machine, in threads of the test's own process."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from pipeline.runtime.drafting import DraftSource
from pipeline.runtime.generate import answer
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.session import SlotSession
from pipeline.runtime.sessions.slots import open_slots
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.runtime.tokenizer import chat_prompt_ids
from pipeline.serve.scheduler import Scheduler
from pipeline.serve.server import ServeRequest, _listen, _running_server, _Server
from tests.support.tiny_decoder import byte_tokenizer, tiny_llama

MODEL = "tiny"
PATIENCE_S = 30.0


@dataclass
class LiveServer:
    """A running server."""

    port: int
    server: _Server
    scheduler: Scheduler
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **settings: Any) -> openai.OpenAI:
        """The official client, which by itself would try again after a 429 or a 5xx."""
        usual: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
        return openai.OpenAI(base_url=f"{self.url}/v1", **(usual | settings))

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)


@contextlib.contextmanager
def live_server(
    folder: Path,
    session: SlotSession | None = None,
    send_buffer_bytes: int | None = None,
    source: DraftSource | None = None,
    **settings: Any,
) -> Iterator[LiveServer]:
    """Serve `folder`, or `session` with the tokenizer of `folder`, drafted for by `source`."""
    request = ServeRequest(folder=folder, port=0, model_name=MODEL, **settings)
    listener = _listen(request.host, request.port)
    if send_buffer_bytes is not None:  # connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    session = session or open_slots(folder, slots=request.slots)
    with listener, _running_server(request, session, source) as server:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        listener_port = listener.getsockname()[1]
        eventually(lambda: server.started)
        try:
            yield LiveServer(listener_port, server, server.scheduler, thread)
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def alone(
    prompt: str | list[dict[str, str]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> str:
    """What `skipcat run` would answer: the reference that knows nothing of slots."""
    tokenizer = byte_tokenizer()
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = chat_prompt_ids(tokenizer, prompt)
    session = TorchSession(tiny_llama())
    decoding = Decoding(max_new_tokens, sampling, stop_ids={257}, seed=seed)
    return answer(session, tokenizer, ids, decoding).text


def send_json(path: str, body: dict[str, Any]) -> bytes:
    """A POST as bytes, for a bare connection."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
