"""Drafters that know what will be said, and what an answer said, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.runtime.drafting import Drafter
from pipeline.runtime.generate import _advance
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.sequence import Decoding, RunningAnswer
from pipeline.runtime.sessions.slotted_session import SlottedSession

_Choice = Callable[[list[int], int], list[int]]

PROMPT = [5, 6, 7, 8, 5, 6, 7]
WARM = Sampling(temperature=0.8, top_k=40, repetition_penalty=1.1)
# What is coming, and where -> what is drafted.
DRAFTS: dict[str, _Choice] = {
    "right": lambda coming, at: coming,
    "wrong": lambda coming, at: [(token + 1) % 250 for token in coming],
    "right at first": lambda coming, at: [*coming[:2], *([1] * len(coming[2:]))],
    "random": lambda coming, at: np.random.default_rng(at).integers(0, 270, len(coming)).tolist(),
    "stops": lambda coming, at: [*coming[:1], 257, 257][: len(coming)],
}


class Scripted:
    """Drafts by what will be said behind `PROMPT`, which it knows."""

    def __init__(self, answer: Sequence[int], length: int, choose: _Choice) -> None:
        self.drafted = self.taken = 0
        self.answer, self.length, self.choose = list(answer), length, choose
        self.heard = -len(PROMPT)

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        self.heard += len(chosen)

    def draft(self, most: int) -> list[int]:
        coming = self.answer[self.heard : self.heard + self.length]
        found = self.choose(coming, self.heard)[: max(most, 0)]
        self.drafted += len(found)
        return found


def said(
    session: SlottedSession, how: Sampling, drafter: Drafter | None, tokens: int = 30
) -> tuple[list[int], bytes]:
    """Ids of an answer, and the bits of the logits they were chosen from and of the cache."""
    logits: list[bytes] = []
    running = RunningAnswer(
        PROMPT,
        Decoding(tokens, how, stop_ids={257}, seed=5),
        session.max_length,
        drafter=drafter,
        watch=lambda token, row: logits.append(row.tobytes()),
    )
    assert list(_advance(session, running)) == running.ids
    read = len(PROMPT) + len(running.ids) - 1
    held = [values[0, :, :read].tobytes() for values in session.values.buffers.values()]
    return running.ids, b"".join([*logits, *held])
