"""Answers to prompts in one process: of a model, of one that is drafted for, or of the draft alone.

What `pipeline.bench.child` opens for `skipcat bench --draft`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.memory import disk_read_bytes, peak_bytes
from pipeline.runtime.draft_model import DraftModel
from pipeline.runtime.draft_tree import branches_of, is_leaf, parents_in_block, path_of
from pipeline.runtime.drafting import Chooser, Drafter, GuessingDrafter
from pipeline.runtime.generate import generate
from pipeline.runtime.open_answering import open_helped
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.tokenizer import chat_prompt_ids, load_tokenizer, stop_token_ids
from validate.metrics import LogitMetrics

if TYPE_CHECKING:
    from pipeline.runtime.sessions.session import Session

PLAIN, DRAFTED, ALONE = "plain", "drafted", "draft alone"
WAYS = (PLAIN, DRAFTED, ALONE)
# Tokens whose logits are compared at a time.
_BLOCK_TOKENS = 16


class _Watched:
    """A drafter that is watched, or none: when it is asked, for how long, and what was right.

    Attributes:
        calls: of the model behind the prompt: before each it is asked once.
        seconds: that drafting took.
        depths: of the first draft token of a call, of the second, and so on: how often it was
            looked at, which is as long as all before it were right, and how often it was right.
        branches: of the drafts of as many branches: how many there were, their tokens, and how many
            of these were right.
    """

    def __init__(self, drafter: Drafter | None) -> None:
        self._drafter = drafter
        self.drafted = self.taken = self.calls = 0
        self.seconds = 0.0
        self.depths: list[list[int]] = []
        self.branches: dict[int, list[int]] = {}

    def guess_by(self, begin: Callable[[], Chooser]) -> None:
        if isinstance(self._drafter, GuessingDrafter):
            self._drafter.guess_by(begin)

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        path = path_of(drafted, chosen)
        self.taken += len(path)
        for depth, node in enumerate([-1, *path][: len(chosen)]):
            if is_leaf(drafted, node):
                break
            if depth == len(self.depths):
                self.depths.append([0, 0])
            self.depths[depth][0] += 1
            self.depths[depth][1] += depth < len(path)
        if drafted:
            parents = parents_in_block(drafted)
            count = 1 if parents is None else len(branches_of(parents))
            own = self.branches.setdefault(count, [0, 0, 0])
            own[:] = own[0] + 1, own[1] + len(drafted), own[2] + len(path)
        if self._drafter is not None:
            self._drafter.learn(drafted, chosen)

    def draft(self, most: int) -> Sequence[int]:
        self.calls += 1
        if self._drafter is None:
            return ()
        started = time.perf_counter()
        found = self._drafter.draft(most)
        self.seconds += time.perf_counter() - started
        self.drafted += len(found)
        return found


class Answering:
    """One way of answering.

    Args:
        target: `way`, `folder`, `draft`, `memory` (a number of bytes as text, or None), `length`
            of the drafts (None for as many as pay), `width` (None for what the model can check),
            and `threads`.
    """

    def __init__(self, target: dict[str, Any]) -> None:
        self._folder = Path(target["folder"])
        self._tokenizer = load_tokenizer(self._folder)
        self._stop_ids = stop_token_ids(self._tokenizer, self._folder)
        self._session, self._source = _open(target)
        self._answers: list[tuple[list[int], list[int]]] = []

    @property
    def ready(self) -> dict[str, Any]:
        """What there is to say of it at once."""
        draft = self._source is not None
        return {"session": self._session.name, "is_drafted": draft}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One measurement: an answer, or a comparison of the draft with the model.

        Args:
            request: `prompt`, a text, and `new_tokens`; or `compare`.
        """
        return self._compare() if "compare" in request else self._turn(**request)

    def _turn(self, prompt: str, new_tokens: int) -> dict[str, Any]:
        """A greedy answer; what is counted begins behind its first token."""
        raw = not self._tokenizer.chat_template
        prompt_ids = chat_prompt_ids(self._tokenizer, [{"role": "user", "content": prompt}], raw)
        watched = _Watched(None if self._source is None else self._source.begin(0))
        decoding = Decoding(new_tokens, stop_ids=self._stop_ids)
        began = time.perf_counter()
        tokens = generate(self._session, prompt_ids, decoding, watched)
        first = next(tokens, None)
        started, read, waited_s = time.perf_counter(), disk_read_bytes(), self._waited_s()
        ids = [] if first is None else [first, *tokens]
        ended, bytes_now = time.perf_counter(), disk_read_bytes()
        self._answers.append((prompt_ids, ids))
        return {
            "ids": ids,
            "first_token_s": started - began,
            "seconds": ended - started,
            "calls": watched.calls,
            "drafted": watched.drafted,
            "taken": watched.taken,
            "depths": watched.depths,
            "branches": [[count, *own] for count, own in sorted(watched.branches.items())],
            "draft_s": watched.seconds,
            "wait_s": self._waited_s() - waited_s,
            "read_bytes": None if read is None or bytes_now is None else bytes_now - read,
            "peak_bytes": peak_bytes(),
            "notice": self._source.take_notice() if self._source else None,
        }

    def _compare(self) -> dict[str, Any]:
        """The draft's logits against the model's, over what was answered, each asked once."""
        assert self._source is not None
        own = self._source.session_alone()
        found = []
        for prompt_ids, ids in {tuple(a): (a, b) for a, b in self._answers if b}.values():
            both = [_logits(session, prompt_ids, ids) for session in (self._session, own)]
            found.append(LogitMetrics.of(*both))
        tokens = sum(metrics.tokens for metrics in found)
        return {
            "tokens": tokens,
            "kl_mean": sum(metrics.kl_mean * metrics.tokens for metrics in found) / tokens,
            "top1_agreement": sum(m.top1_agreement * m.tokens for m in found) / tokens,
        }

    def _waited_s(self) -> float:
        """Seconds that calls have waited for the disk."""
        traffic = getattr(self._session, "traffic", None)
        return 0.0 if traffic is None else float(traffic.waited_s)


def _open(target: dict[str, Any]) -> tuple[Session, DraftModel | None]:
    """The session of a way, and what drafts for it."""
    folder, draft, memory = Path(target["folder"]), Path(target["draft"]), target["memory"]
    threads = target["threads"]
    if target["way"] == ALONE:
        return CpuSession(draft, threads), None
    if target["way"] == DRAFTED:
        how = {"length": target["length"], "width": target["width"]}
        return open_helped(folder, draft, "auto", threads, memory=memory, **how)
    if memory is None:
        return open_session(folder, threads=threads), None
    from pipeline.runtime.offload.open_offloaded import open_plain

    return open_plain(folder, memory, draft, threads), None


def _logits(session: Session, prompt_ids: Sequence[int], ids: Sequence[int]) -> np.ndarray:
    """Of each token of an answer, those that it is chosen from: float32 [N, V]."""
    session.reset()
    rows = [session.forward(np.array([prompt_ids], np.int64), last_only=True)[0]]
    for start in range(0, len(ids) - 1, _BLOCK_TOKENS):
        block = ids[start : min(start + _BLOCK_TOKENS, len(ids) - 1)]
        rows.append(session.forward(np.array([block], np.int64))[0])
    return np.concatenate(rows)
