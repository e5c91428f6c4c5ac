"""One engine in a process of its own, for generation.py: requests and answers in lines of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.child_process import answers_on_stdout


class _Ours:
    """What `open_session` opens."""

    def __init__(self, folder: str, threads: int) -> None:
        from pipeline.runtime.sessions.open_session import open_session

        self.session = open_session(Path(folder), threads=threads)

    def generate(self, ids: list[int], new: int, lookup: bool) -> dict[str, Any]:
        """Read a prompt and answer greedily, as `skipcat run` does; seconds of every token."""
        from pipeline.runtime.drafting import PROMPT_LOOKUP, make_drafter
        from pipeline.runtime.generate import generate
        from pipeline.runtime.sequence import Decoding

        drafter = make_drafter(self.session, PROMPT_LOOKUP if lookup else None)
        tokens, times = [], [time.perf_counter()]
        for token in generate(self.session, ids, Decoding(new + 1), drafter):
            times.append(time.perf_counter())
            tokens.append(token)
        seconds = np.diff(times).tolist()
        taken = {"drafted": drafter.drafted, "taken": drafter.taken} if drafter else {}
        return {"prefill_s": seconds[0], "token_s": seconds[1:], "tokens": tokens, **taken}

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of every token, [S, V]."""
        self.session.reset()
        return self.session.forward(np.array([ids], np.int64))[0]


class _Genai:
    """A folder of onnxruntime-genai's own builder, through its own generator."""

    def __init__(self, folder: str, threads: int) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        config = onnxruntime_genai.Config(folder)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)

    def generate(self, ids: list[int], new: int, lookup: bool) -> dict[str, Any]:
        """Read a prompt and answer greedily; seconds of every token."""
        assert not lookup, "this engine drafts no tokens"
        self._reset(len(ids) + new + 1)
        tokens, times = [], [time.perf_counter()]
        self.generator.append_tokens(ids)
        for _ in range(new + 1):
            self.generator.generate_next_token()
            tokens.append(int(self.generator.get_next_tokens()[0]))
            times.append(time.perf_counter())
        seconds = np.diff(times).tolist()
        return {"prefill_s": seconds[0], "token_s": seconds[1:], "tokens": tokens}

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of every token, [S, V]."""
        self._reset(len(ids) + 1)
        self.generator.append_tokens(ids)
        return np.asarray(self.generator.get_output("logits"))[0]

    def _reset(self, length: int) -> None:
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        self.generator = self.library.Generator(self.model, parameters)


def _score(engine: _Ours | _Genai, ids: list[int]) -> dict[str, float]:
    """Mean negative log-likelihood of all tokens after the first."""
    logits = engine.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    chosen = logits[np.arange(len(logits)), ids[1:]]
    return {"nll": float((log_sums - chosen).mean())}


def main() -> None:
    tell = answers_on_stdout()
    kind, folder, threads = sys.argv[1:4]
    engine: _Ours | _Genai = (_Ours if kind == "ours" else _Genai)(folder, int(threads))
    tell({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "generate":
            how = request["ids"], request["new"], request.get("lookup", False)
            answer: dict[str, Any] = engine.generate(*how)
        else:
            answer = _score(engine, request["ids"])
        tell(answer)


if __name__ == "__main__":
    main()
