"""Drafters that know what will be said, and what an answer said, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.runtime.draft_tree import Draft, path_of
from pipeline.runtime.drafting import Drafter
from pipeline.runtime.generate import _advance
from pipeline.runtime.sampling import Sampling
from pipeline.runtime.sequence import Decoding, RunningAnswer
from pipeline.runtime.sessions.slotted_session import SlottedSession

_Choice = Callable[[list[int], int], Sequence[int]]

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


def forked(trunk: list[int], wrong: list[int], rest: list[int]) -> Draft:
    """Tokens that go on in two ways, the wrong one first."""
    count, first = len(trunk), list(range(-1, len(trunk) + len(wrong) - 1))
    second = [count - 1, *range(len(first), len(first) + len(rest) - 1)][: len(rest)]
    return Draft([*trunk, *wrong, *rest], [*first, *second])


def random_tree(coming: list[int], at: int) -> Draft:
    """Sixteen tokens at most, of which some are right."""
    random = np.random.default_rng(at)
    parents: list[int] = []
    depths: list[int] = []
    path = [-1]
    for node in range(int(random.integers(1, 17)) if coming else 0):
        path = path[: 1 + min(len(coming) - 1, int(random.integers(0, len(path) + 2)))]
        parents.append(path[-1])
        depths.append(len(path) - 1)
        path.append(node)
    tokens = [coming[d] if random.random() < 0.6 else int(random.integers(0, 250)) for d in depths]
    return Draft(tokens, parents)


# The same for trees.
TREES: dict[str, _Choice] = {
    "right, and wrong beside": lambda coming, at: Draft(
        [*coming[:8], *[7] * len(coming[:8])],
        [*range(-1, len(coming[:8]) - 1), *range(-1, len(coming[:8]) - 1)],
    ),
    "wrong": lambda coming, at: forked([], [251] * len(coming[:3]), [252] * len(coming[:8])),
    "right in the second": lambda coming, at: forked([], [251] * len(coming[:3]), coming[:8]),
    "right in the longer": lambda coming, at: forked(
        coming[:2], [251] * len(coming[2:4]), coming[2:9]
    ),
    "random": random_tree,
    "stops": lambda coming, at: forked(coming[:1], [257] * len(coming[1:3]), coming[1:3]),
}


class Scripted:
    """Drafts by what will be said behind `PROMPT`, which it knows."""

    def __init__(self, answer: Sequence[int], length: int, choose: _Choice) -> None:
        self.drafted = self.taken = 0
        self.answer, self.length, self.choose = list(answer), length, choose
        self.heard = -len(PROMPT)

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        self.heard += len(chosen)
        self.taken += len(path_of(drafted, chosen))

    def draft(self, most: int) -> Sequence[int]:
        coming = self.answer[self.heard : self.heard + min(self.length, max(most, 0))]
        found = self.choose(coming, self.heard)
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
