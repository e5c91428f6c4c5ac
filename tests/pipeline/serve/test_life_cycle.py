"""Clients that leave, stall or crowd, and the end of the server."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.slots import _SlotsOneByOne, open_slots
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.runtime.tokenizer import load_tokenizer
from pipeline.serve.app import Limits
from pipeline.serve.job import Ending, Job, Outbox
from pipeline.serve.scheduler import Scheduler
from tests.support.live_server import (
    MODEL,
    LiveServer,
    alone,
    eventually,
    live_server,
    send_json,
)
from tests.support.tiny_decoder import MAX_LENGTH, byte_tokenizer, tiny_llama

LONG: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 120, "temperature": 0}


class GatedSlots(_SlotsOneByOne):
    """Real slots whose decoding waits until the test lets it go on."""

    def __init__(self, slots: int) -> None:
        super().__init__(TorchSession(tiny_llama()), slots)
        self.gate = threading.Event()
        self.decoded: list[int] = []

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        assert self.gate.wait(30)
        self.decoded += slots
        return super().decode(slots, tokens)


@pytest.fixture
def gated() -> Iterator[GatedSlots]:
    slots = GatedSlots(1)
    yield slots
    slots.gate.set()


def begin(server: LiveServer, **fields: Any) -> socket.socket:
    """Send a request for a stream; do not read."""
    connection = server.connect()
    connection.sendall(send_json("/v1/completions", LONG | {"stream": True} | fields))
    return connection


def test_a_client_that_leaves_frees_its_slot_and_the_next_is_answered(
    folder: Path, gated: GatedSlots
) -> None:
    with live_server(folder, gated) as server:
        connection = begin(server)
        eventually(lambda: server.scheduler.load().running == 1)
        whole = begin(server, stream=False)
        eventually(lambda: server.scheduler.load().waiting == 1)
        whole.close()
        eventually(lambda: server.scheduler.load().waiting == 0)
        assert connection.recv(100)
        connection.close()
        eventually(lambda: next(iter(server.scheduler._running.values())).job.is_cancelled)
        gated.gate.set()
        eventually(lambda: server.scheduler.load().running == 0)
        assert len(gated.decoded) <= 1  # the step that ran, of 120
        result = server.client().completions.create(**LONG)
        assert result.choices[0].text == alone("abc", 120)


def test_beyond_the_queue_there_is_a_429_which_the_client_survives(
    folder: Path, gated: GatedSlots
) -> None:
    with live_server(folder, gated, queue=1) as server:
        connections = [begin(server)]
        eventually(lambda: server.scheduler.load().running == 1)
        connections.append(begin(server))
        eventually(lambda: server.scheduler.load().waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            server.client().completions.create(**LONG)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "queue_full"
        gated.gate.set()
        result = server.client(max_retries=5).completions.create(**LONG)
        assert result.choices[0].text == alone("abc", 120)
        for connection in connections:
            connection.close()


def test_a_stalled_reader_is_cut_off_and_holds_up_nobody(folder: Path) -> None:
    limits = Limits(client_timeout_s=1.0)
    with live_server(folder, send_buffer_bytes=4096, slots=2, limits=limits) as server:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stalled.connect(("127.0.0.1", server.port))
        # Pipelined, so that more is sent than the buffers of system and server hold.
        stalled.sendall(send_json("/v1/completions", LONG | {"stream": True}) * 20)
        for _ in range(3):
            result = server.client().completions.create(**LONG)
            assert result.choices[0].text == alone("abc", 120)
        eventually(lambda: not server.server.server_state.connections)
        eventually(lambda: server.scheduler.load().running == 0)
        stalled.close()


def test_an_outbox_that_is_full_pauses_its_slot_alone(folder: Path) -> None:
    scheduler = Scheduler(
        open_slots(folder, slots=2), load_tokenizer(folder), frozenset({257}), queue=2
    )

    async def ask(capacity: int) -> Job:
        box = Outbox(scheduler.wake, capacity)
        job = Job(byte_tokenizer().encode("abc"), Decoding(100), box)
        scheduler.submit(job)
        return job

    async def read(job: Job) -> str:
        texts: list[str] = []
        while True:
            for piece in await job.outbox.take():
                if isinstance(piece, Ending):
                    return "".join(texts)
                assert isinstance(piece, str)
                texts.append(piece)

    async def scene() -> tuple[str, str, int]:
        slow, quick = await ask(4), await ask(1000)
        text = await read(quick)
        held = len(slow.outbox._pieces)
        return text, await read(slow), held

    try:
        quick, slow, held = asyncio.run(scene())
    finally:
        scheduler.close()
    assert held == 4
    assert quick == slow == alone("abc", 100)


def test_a_header_or_a_body_that_never_ends_is_given_up(folder: Path) -> None:
    limits = Limits(client_timeout_s=0.3)
    request = send_json("/v1/completions", LONG)
    with live_server(folder, limits=limits) as server:
        for part, status in ((request[:20], b"408"), (request[:-5], b"408"), (b"", b"")):
            with server.connect() as connection:
                connection.sendall(part)
                answer = b""
                while received := connection.recv(1000):
                    answer += received
                assert answer[9:12] == status
                if answer:
                    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
                    assert error["code"] == "request_timeout"


def test_a_connection_serves_several_requests(served: LiveServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    for _ in range(3):
        body = json.dumps(LONG | {"max_tokens": 4})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == alone("abc", 4)
        # Refused without its body being read: the connection stays usable all the same.
        connection.request("POST", "/nowhere", "x" * 100_000)
        assert connection.getresponse().read()


def test_running_streams_are_finished_within_the_grace_period(
    folder: Path, gated: GatedSlots
) -> None:
    with live_server(folder, gated, grace_s=20) as server:
        stream = server.client().completions.create(stream=True, **LONG)
        first = next(stream).choices[0].text
        waiting = begin(server)
        eventually(lambda: server.scheduler.load().waiting == 1)
        server.server.should_exit = True
        # The one that waits is turned away at once, and says so.
        assert b"503" in waiting.recv(100)
        assert not server.scheduler.is_open
        gated.gate.set()
        assert first + "".join(chunk.choices[0].text for chunk in stream) == alone("abc", 120)
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_streams_that_run_longer_end_with_an_error_and_the_end_mark(
    folder: Path, gated: GatedSlots
) -> None:
    with live_server(folder, gated, grace_s=0) as server:
        connection = begin(server)
        received = connection.recv(1000)
        server.server.should_exit = True
        eventually(lambda: not server.scheduler.is_open)
        gated.gate.set()
        while part := connection.recv(1000):
            received += part
        events = [line[6:] for line in received.split(b"\n") if line.startswith(b"data: ")]
        assert events[-1].strip() == b"[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "shutting_down"
        connection.close()


class FaultySlots(_SlotsOneByOne):
    """Real slots, but for prompts that begin with `n` (NaN) or `r` (an exception)."""

    def __init__(self, slots: int) -> None:
        super().__init__(TorchSession(tiny_llama()), slots)
        self.faults: dict[int, str] = {}

    def prefill(self, slot: int, input_ids: np.ndarray) -> np.ndarray:
        if self.slot_length(slot) == 0:
            letters = {byte: chr(byte) for byte in b"nrp"}
            # The byte tokenizer numbers printable characters from "!" on.
            self.faults[slot] = letters.get(int(input_ids[0]) + ord("!"), "")
        if self.faults[slot] == "p":
            raise RuntimeError("this prompt cannot be read")
        return super().prefill(slot, input_ids)

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        rows = []
        for slot, token in zip(slots, tokens, strict=True):
            if self.faults[slot] == "r":
                raise RuntimeError("this slot cannot be decoded")
            row = super().prefill(slot, np.array([token]))
            rows.append(np.full_like(row, np.nan) if self.faults[slot] == "n" else row)
        return np.stack(rows)


def test_a_slot_that_fails_does_not_take_the_others_with_it(folder: Path) -> None:
    with live_server(folder, FaultySlots(4), reuse=False) as server:
        client = server.client()

        def ask(prompt: str) -> str:
            settings = LONG | {"prompt": prompt, "max_tokens": 30}
            try:
                return client.completions.create(**settings).choices[0].text
            except openai.InternalServerError as error:
                return f"{error.status_code} {error.code}"

        prompts = ["abc", "nnn", "good", "rrr", "ppp"] * 4
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = dict(zip(prompts, pool.map(ask, prompts), strict=True))
        assert answers["abc"] == alone("abc", 30)
        assert answers["good"] == alone("good", 30)
        assert {answers[prompt] for prompt in ("nnn", "rrr", "ppp")} == {"500 internal_error"}


def test_a_failure_in_mid_stream_is_an_event_that_the_client_raises(folder: Path) -> None:
    with live_server(folder, FaultySlots(1)) as server:
        stream = server.client().completions.create(stream=True, **(LONG | {"prompt": "nnn"}))
        with pytest.raises(openai.APIError, match="not finite"):
            list(stream)


def test_memory_of_slots_and_boxes_is_bounded_by_their_limits(folder: Path) -> None:
    with live_server(folder, slots=2, queue=1) as server:
        connections = [begin(server) for _ in range(40)]
        eventually(lambda: server.scheduler.load().running == 0)
        load = server.scheduler.load()
        assert load.waiting == 0
        tokens = server.scheduler._table.tokens
        assert max(map(len, tokens)) <= MAX_LENGTH
        for connection in connections:
            connection.close()
        eventually(lambda: not server.server.server_state.connections)
        eventually(lambda: not server.server.server_state.tasks)
