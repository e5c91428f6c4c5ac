"""A model plain and drafted, and its draft alone: answers in turns, each way in its own process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.answering import DRAFTED, PLAIN, WAYS
from pipeline.bench.measure import MeasuringChild, describe_machine, load_average, summary
from pipeline.errors import InputError
from pipeline.progress import note, track
from pipeline.provenance import provenance, public_name

_SCHEMA = 1
_WARM_UP_TOKENS = 4
_SUMS = ("seconds", "calls", "drafted", "taken", "draft_s", "wait_s")
# A question, something to write, and a text to go on from.
PROMPTS = (
    "What is a whale?",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Rewrite in simpler words: The mitochondrion is an organelle of eukaryotic cells in which the "
    "energy of nutrients is converted to adenosine triphosphate, by which it is carried to where "
    "the cell needs it.",
)
_Turns = dict[str, list[list[dict[str, Any]]]]


@dataclass(frozen=True)
class DraftedTarget:
    """A model and what drafts for it.

    Attributes:
        folder: of the model.
        draft: an export of it in fewer bytes.
        memory: bytes that the model may take, such as "1GB", as for `open_offloaded`; or None.
        length: tokens of every draft; None takes as many as pay.
        width: most guesses at one place, 1 for chains; None takes what the model can check.
        threads: of each way.
    """

    folder: Path
    draft: Path
    memory: str | None
    length: int | None
    width: int | None
    threads: int


def measure_drafting(
    target: DraftedTarget,
    prompts: Sequence[str],
    new_tokens: int,
    rounds: int,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answer the prompts in each way, in turns.

    Args:
        target: what answers.
        prompts: texts, each a user's message where the model has a chat format.
        new_tokens: most tokens of an answer.
        rounds: turns over all prompts, after one that warms up.
        tell: takes a line for every turn.

    Returns:
        The record: machine, settings, a row for each way, and how far the draft is from the model.

    Raises:
        InputError, UsageError: the folders do not load, or do not fit each other.
        ResourceError: not enough memory.
    """
    before = load_average()
    with contextlib.ExitStack() as stack:
        children = {way: stack.enter_context(_child(target, way)) for way in WAYS}
        for child in children.values():
            child.wait_until_open()
            child.ask(prompt=prompts[0], new_tokens=min(_WARM_UP_TOKENS, new_tokens))
        turns = _take_turns(children, prompts, new_tokens, rounds, tell)
        rows = [_row_of(way, children[way].ready["session"], turns[way]) for way in WAYS]
        is_drafted = children[DRAFTED].ready["is_drafted"]
        alone = children[DRAFTED].ask(compare=True) if is_drafted else None
    rates = {row["way"]: row["tokens_per_s"]["median"] for row in rows}
    settings = asdict(target) | {"new_tokens": new_tokens, "rounds": rounds}
    settings |= {name: public_name(settings[name]) for name in ("folder", "draft")}
    return {
        "schema": _SCHEMA,
        "kind": "drafting",
        "machine": describe_machine(),
        "provenance": provenance(),
        "settings": settings | {"prompts": len(prompts)},
        "load_average": [before, load_average()],
        "rows": rows,
        "ratio": rates[DRAFTED] / rates[PLAIN],
        "answers": len(prompts),
        "same_as_plain": _equal(turns[PLAIN], turns[DRAFTED]),
        "draft_alone": alone,
    }


def _child(target: DraftedTarget, way: str) -> MeasuringChild:
    """The process of one way."""
    request = asdict(target) | {"folder": str(target.folder), "draft": str(target.draft)}
    label = f"{public_name(target.folder)}, {way}"
    return MeasuringChild(label, {"kind": "answers", "way": way} | request)


def _take_turns(
    children: dict[str, MeasuringChild],
    prompts: Sequence[str],
    new_tokens: int,
    rounds: int,
    tell: Callable[[str], None],
) -> _Turns:
    """Way -> round -> the turn of each prompt; another way comes first in each turn."""
    found: _Turns = {way: [] for way in WAYS}
    for number in track(range(rounds), "rounds"):
        for way in WAYS:
            found[way].append([])
        for place, prompt in enumerate(prompts):
            first = (number + place) % len(WAYS)
            for way in (*WAYS[first:], *WAYS[:first]):
                turn = children[way].ask(prompt=prompt, new_tokens=new_tokens)
                found[way][-1].append(turn)
                if turn["notice"]:
                    note(turn["notice"])
        for way in WAYS:
            tell(f"round {number + 1}: {way} {_rate(found[way][-1]):.2f} tokens/s")
    return found


def _row_of(way: str, session: str, rounds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of one way.

    Raises:
        InputError: no answer is longer than a token.
    """
    turns = [turn for each in rounds for turn in each]
    total = {name: sum(turn[name] for turn in turns) for name in _SUMS}
    tokens = sum(_tokens(turn) for turn in turns)
    if tokens == 0:
        raise InputError(
            "There is nothing to measure: every answer ended with its first token.",
            where="--prompts",
            change="give prompts that are answered at more length",
        )
    read = [turn["read_bytes"] for turn in turns if turn["read_bytes"] is not None]
    seconds = total["seconds"]
    return {
        "way": way,
        "session": session,
        "tokens_per_s": summary([_rate(each) for each in rounds]),
        "first_token_s": summary([turn["first_token_s"] for turn in turns]),
        "tokens": tokens,
        "calls": total["calls"],
        "tokens_per_call": tokens / total["calls"],
        "read_bytes_per_token": sum(read) / tokens if len(read) == len(turns) else None,
        "drafted": total["drafted"],
        "taken": total["taken"],
        "acceptance": _acceptance([turn["depths"] for turn in turns]),
        "branches": _by_branches([turn["branches"] for turn in turns]),
        "shares": {
            "draft": total["draft_s"] / seconds,
            "wait": total["wait_s"] / seconds,
            "verify": 1 - (total["draft_s"] + total["wait_s"]) / seconds,
        },
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
    }


def _acceptance(found: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, Any]]:
    """By depth, from 1 on: of the draft tokens whose predecessors were right, how many were."""
    depths = []
    for depth in range(max(map(len, found), default=0)):
        own = [turn[depth] for turn in found if len(turn) > depth]
        tried, taken = (sum(counts) for counts in zip(*own, strict=True))
        depths.append({"depth": depth + 1, "tried": tried, "taken": taken, "share": taken / tried})
    return depths


def _by_branches(found: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, int]]:
    """Calls with drafts by how many branches these had, their draft tokens, and those taken."""
    rows = []
    for count in sorted({of[0] for turn in found for of in turn}):
        own = [of[1:] for turn in found for of in turn if of[0] == count]
        calls, drafted, taken = (sum(numbers) for numbers in zip(*own, strict=True))
        rows.append({"branches": count, "calls": calls, "drafted": drafted, "taken": taken})
    return rows


def _tokens(turn: dict[str, Any]) -> int:
    """Tokens behind the first, which comes with the prompt."""
    return max(0, len(turn["ids"]) - 1)


def _rate(turns: Sequence[dict[str, Any]]) -> float:
    """Tokens a second over some answers."""
    seconds = sum(turn["seconds"] for turn in turns)
    return sum(_tokens(turn) for turn in turns) / seconds if seconds else 0.0


def _equal(
    one: Sequence[Sequence[dict[str, Any]]], other: Sequence[Sequence[dict[str, Any]]]
) -> int:
    """Prompts whose answers were the same in every round."""
    rounds = [
        [a["ids"] == b["ids"] for a, b in zip(*pair, strict=True)]
        for pair in zip(one, other, strict=True)
    ]
    return sum(map(all, zip(*rounds, strict=True)))
