r"""The server under load: 64 clients, 1,000 requests, with broken ones, large ones and leavers.

    python -m benchmarks.serve.server_load                                    # a tiny random model
    python -m benchmarks.serve.server_load --folder build/onnx --slots 8      # a real one

Each prompt is first asked alone, twice; under load its streamed text must be one of the two (which
are the same, but where rounded weights turn a near-tie), greedily. The memory of the server process
is taken all along, and its open files before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx2
import openai
import psutil

from benchmarks import RESULTS
from benchmarks.command import SKIPCAT, run
from benchmarks.serve.server_load_report import ALLOWED_STATUS, failures, summary, weights_of
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.child_process import environment
from pipeline.progress import note, track
from pipeline.provenance import provenance

SCHEMA = 1
RESULT = RESULTS / "server_load.json"
MAX_BODY_BYTES = 1 << 20
SAMPLE_S = 0.05
# Until the server has seen that the last clients are gone.
SETTLE_S = 2.0
# Of 100 requests; the others are good ones.
BAD_PERCENT, LEAVING_PERCENT = 25, 5


@dataclass
class Answer:
    """What one good request got."""

    prompt: int
    text: str
    first_token_s: float
    total_s: float
    ended: str | None


@dataclass
class Tally:
    """What happened to all requests."""

    answers: list[Answer] = field(default_factory=list)
    refused: Counter[tuple[str, int]] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    left: int = 0
    memory_bytes: list[int] = field(default_factory=list)


@dataclass
class Load:
    """A running server and what to ask it."""

    url: str
    model: str
    max_length: int
    prompts: list[str]
    new_tokens: int
    openai: openai.AsyncOpenAI
    http: httpx2.AsyncClient
    tally: Tally = field(default_factory=Tally)

    def body(self, prompt: int, **changes: Any) -> dict[str, Any]:
        """A good request for a stream."""
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": self.prompts[prompt]}],
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "stream": True,
        } | changes


def make_prompts(count: int, generator: random.Random) -> list[str]:
    """Different texts of different lengths, some with the same beginning."""
    words = "river stone light music garden winter letter engine window paper".split()  # noqa: SIM905
    return [
        f"{index} " + " ".join(generator.choices(words, k=generator.randint(1, 8)))
        for index in range(count)
    ]


async def ask(load: Load, prompt: int) -> Answer:
    """A stream through the official client."""
    started = time.perf_counter()
    first_s, texts, ended = None, [], None
    stream = await load.openai.chat.completions.create(**load.body(prompt))
    async for chunk in stream:
        choice = chunk.choices[0]
        if choice.delta.content and first_s is None:
            first_s = time.perf_counter() - started
        texts.append(choice.delta.content or "")
        ended = choice.finish_reason or ended
    total_s = time.perf_counter() - started
    return Answer(prompt, "".join(texts), first_s or total_s, total_s, ended)


async def leave(load: Load, prompt: int) -> None:
    """Begin a stream and go away after its first bytes."""
    body = load.body(prompt)
    async with load.http.stream("POST", f"{load.url}/chat/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            return


async def misuse(load: Load, kind: str) -> int:
    """Send something bad; return the status."""
    route = f"{load.url}/chat/completions"
    body = load.body(0)
    bodies: dict[str, Any] = {
        "no_messages": {"model": load.model},
        "wrong_type": body | {"max_tokens": "many"},
        "two_answers": body | {"n": 2},
        "unknown_field": body | {"logit_bias": {"1": 5}},
        "unknown_model": body | {"model": "another"},
        "prompt_too_long": body
        | {"messages": [{"role": "user", "content": "x y z " * load.max_length}]},
        "body_too_long": body | {"user": "x" * (2 * MAX_BODY_BYTES)},
    }
    if kind in bodies:
        return (await load.http.post(route, json=bodies[kind])).status_code
    if kind == "not_json":
        headers = {"Content-Type": "application/json"}
        return (await load.http.post(route, content=b'{"model": ', headers=headers)).status_code
    if kind == "wrong_content_type":
        return (await load.http.post(route, content=json.dumps(body).encode())).status_code
    if kind == "unknown_route":
        return (await load.http.post(f"{load.url}/nowhere", json=body)).status_code
    if kind == "wrong_method":
        return (await load.http.get(route)).status_code
    return await send_garbage(load.url)


async def send_garbage(url: str) -> int:
    """Bytes that are not HTTP; the status of the answer."""
    address = httpx2.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ")[1])


async def one_request(load: Load, kind: str, prompt: int) -> None:
    """A request of some kind, into the tally."""
    tally = load.tally
    try:
        if kind == "good":
            tally.answers.append(await ask(load, prompt))
        elif kind == "leaving":
            await leave(load, prompt)
            tally.left += 1
        else:
            tally.refused[kind, await misuse(load, kind)] += 1
    except (openai.OpenAIError, httpx2.HTTPError, OSError, ValueError, IndexError) as error:
        tally.lost.append(f"{kind}: {type(error).__name__}: {error}")


async def crowd(load: Load, kinds: list[str], clients: int, generator: random.Random) -> None:
    """All requests, by so many clients at once, each of which takes the next when it is free."""
    jobs = iter([(kind, generator.randrange(len(load.prompts))) for kind in kinds])

    async def client() -> None:
        for kind, prompt in jobs:
            await one_request(load, kind, prompt)

    await asyncio.gather(*(client() for _ in range(clients)))


def make_kinds(count: int, generator: random.Random) -> list[str]:
    """Kinds of requests in random order: good ones, bad ones of every kind, leavers."""
    bad = count * BAD_PERCENT // 100
    leaving = count * LEAVING_PERCENT // 100
    names = list(ALLOWED_STATUS)
    kinds = [names[index % len(names)] for index in range(bad)]
    kinds += ["leaving"] * leaving + ["good"] * (count - bad - leaving)
    generator.shuffle(kinds)
    return kinds


@contextlib.asynccontextmanager
async def sampling_memory(process: psutil.Process, samples: list[int]) -> AsyncIterator[None]:
    """Take the resident memory of a process again and again."""

    async def sample() -> None:
        while True:
            samples.append(process.memory_info().rss)
            await asyncio.sleep(SAMPLE_S)

    task = asyncio.ensure_future(sample())
    try:
        yield
    finally:
        task.cancel()


@contextlib.contextmanager
def server(folder: Path, arguments: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """`skipcat serve` as a user runs it; its URL and its process."""
    command = [*SKIPCAT, "serve", str(folder), "--port", "0", *arguments]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert child.stderr is not None
    try:
        log: list[str] = []
        for line in child.stderr:
            log.append(line)
            if found := re.search(r"http://\S+/v1", line):
                yield found[0], psutil.Process(child.pid)
                break
        else:
            raise click.ClickException("".join(log))
        child.send_signal(signal.SIGTERM)
        errors = child.stderr.read()
        if child.wait(60) != 0 or "Traceback" in errors:
            raise click.ClickException(f"the server ended with {child.returncode}: {errors}")
    finally:
        child.kill()
        child.wait()


async def measure(
    url: str, process: psutil.Process, requests: int, clients: int, prompts: int, tokens: int
) -> dict[str, Any]:
    """Ask every prompt alone, then all at once; the record."""
    generator = random.Random(0)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients)
    async with (
        openai.AsyncOpenAI(base_url=url, api_key="none", timeout=3600, max_retries=8) as client,
        httpx2.AsyncClient(timeout=3600, limits=limits) as http,
    ):
        model = (await client.models.list()).data[0]
        texts = make_prompts(prompts, generator)
        length = model.model_extra["max_model_len"] if model.model_extra else 0
        load = Load(url, model.id, length, texts, tokens, client, http)
        alone = {}
        for prompt in track(range(prompts), "alone"):
            # The second goes on from what the first has left, and a near-tie may turn with that.
            alone[prompt] = [(await ask(load, prompt)).text for _ in range(2)]
        files_before = process.num_fds()
        kinds = make_kinds(requests, generator)
        note(f"{clients} clients, {requests} requests")
        started = time.perf_counter()
        async with sampling_memory(process, load.tally.memory_bytes):
            await crowd(load, kinds, clients, generator)
        seconds = time.perf_counter() - started
        await asyncio.sleep(SETTLE_S)
        health = (await http.get(url.removesuffix("v1") + "health")).json()
    await asyncio.sleep(SETTLE_S)
    files = {"before": files_before, "after": process.num_fds()}
    return summary(load, alone, kinds, seconds) | {"health_after": health, "open_files": files}


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, exists=True), help="[tiny, random]")
@click.option("--requests", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--clients", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--prompts", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--output", type=click.Path(path_type=Path), default=RESULT, show_default=True)
def command(
    folder: Path | None,
    requests: int,
    clients: int,
    prompts: int,
    tokens: int,
    slots: int,
    threads: int | None,
    output: Path,
) -> None:
    """Load the server, print and write what happened; fail when something does not hold."""
    arguments = ["--slots", str(slots), "--queue", str(clients)]
    arguments += ["--max-body-bytes", str(MAX_BODY_BYTES)]
    arguments += ["--threads", str(threads)] if threads else []
    before = load_average()
    with (
        tempfile.TemporaryDirectory() as work,
        server(folder or tiny_export(Path(work)), arguments) as (url, process),
    ):
        figures = asyncio.run(measure(url, process, requests, clients, prompts, tokens))
    record = {
        "schema": SCHEMA,
        "model": folder.name if folder else "tiny random Llama, opset24 float32",
        "weights": weights_of(folder),
        "machine": describe_machine(),
        "load_average": [before, load_average()],
        "clients": clients,
        "requests": requests,
        "new_tokens": tokens,
        "server": arguments,
        **figures,
        "provenance": provenance(),
    }
    write_json(output, record)
    click.echo(json.dumps(figures, indent=2))
    if broken := failures(record):
        raise click.ClickException(f"does not hold: {', '.join(broken)}")


def tiny_export(work: Path) -> Path:
    """The model of the tests, exported."""
    from benchmarks.models import export_tiny, save_tiny_folder

    return export_tiny(save_tiny_folder(work / "model"), work / "tiny", "opset24")


if __name__ == "__main__":
    sys.exit(run(command))
