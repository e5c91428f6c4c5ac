"""One engine in a process of its own, for generation.py: requests and answers in lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.child_process import answers_on_stdout

Feed = Callable[[list[int]], np.ndarray]


class Ours:
    """What `open_session` opens."""

    def __init__(self, folder: str, threads: int) -> None:
        from pipeline.runtime.sessions.open_session import open_session

        self.session = open_session(Path(folder), threads=threads)

    def reset(self, length: int) -> None:
        self.session.reset()

    def feed(self, ids: list[int]) -> int:
        """Append tokens; the likeliest next one."""
        logits = self.session.forward(np.array([ids], np.int64), last_only=True)
        return int(logits[0, -1].argmax())

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of every token, [S, V]."""
        self.session.reset()
        return self.session.forward(np.array([ids], np.int64))[0]


class Genai:
    """A folder of onnxruntime-genai's own builder, through its own generator."""

    def __init__(self, folder: str, threads: int) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        config = onnxruntime_genai.Config(folder)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)

    def reset(self, length: int) -> None:
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        self.generator = self.library.Generator(self.model, parameters)
        self.first = True

    def feed(self, ids: list[int]) -> int:
        """Append tokens; the likeliest next one. It appends that one by itself."""
        if self.first:
            self.generator.append_tokens(ids)
            self.first = False
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of every token, [S, V]."""
        self.reset(len(ids) + 1)
        self.generator.append_tokens(ids)
        return np.asarray(self.generator.get_output("logits"))[0]


def generate(engine: Ours | Genai, ids: list[int], new: int, lookup: bool) -> dict[str, Any]:
    """Read a prompt and generate greedily; seconds of both."""
    if lookup:
        assert isinstance(engine, Ours)
        return generate_by_lookup(engine.session, ids, new)
    engine.reset(len(ids) + new + 1)
    started = time.perf_counter()
    token = engine.feed(ids)
    prefill_s = time.perf_counter() - started
    token_s, tokens = [], [token]
    for _ in range(new):
        started = time.perf_counter()
        token = engine.feed([token])
        token_s.append(time.perf_counter() - started)
        tokens.append(token)
    return {"prefill_s": prefill_s, "token_s": token_s, "tokens": tokens}


def generate_by_lookup(session: Any, ids: list[int], new: int) -> dict[str, Any]:
    """The same, by prompt lookup, as `skipcat run` does it."""
    from pipeline.runtime.drafting import Lookup
    from pipeline.runtime.generate import generate as generated

    lookup = Lookup(session.row_cost)
    tokens, times = [], [time.perf_counter()]
    for token in generated(session, ids, new + 1, lookup=lookup):
        times.append(time.perf_counter())
        tokens.append(token)
    seconds = np.diff(times).tolist()
    taken = {"drafted": lookup.drafted, "taken": lookup.taken}
    return {"prefill_s": seconds[0], "token_s": seconds[1:], "tokens": tokens, **taken}


def score(engine: Ours | Genai, ids: list[int]) -> dict[str, float]:
    """Mean negative log-likelihood of all tokens after the first."""
    logits = engine.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    chosen = logits[np.arange(len(logits)), ids[1:]]
    return {"nll": float((log_sums - chosen).mean())}


def main() -> None:
    tell = answers_on_stdout()
    kind, folder, threads = sys.argv[1:4]
    engine = (Ours if kind == "ours" else Genai)(folder, int(threads))
    tell({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "generate":
            answer: dict[str, Any] = generate(
                engine, request["ids"], request["new"], request.get("lookup", False)
            )
        else:
            answer = score(engine, request["ids"])
        tell(answer)


if __name__ == "__main__":
    main()
