"""Answers without and with drafts, in turns: what the benchmarks of drafting share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.bench.measure import describe_machine, load_average
from pipeline.errors import ValidationError
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.runtime.draft_model import DraftModel
from pipeline.runtime.drafting import Drafter

PLAIN, STEADY, DRAFTED = "plain", "steady", "drafted"
WAYS = (PLAIN, STEADY, DRAFTED)
Turns = dict[str, list[dict[str, Any]]]
_SCHEMA = 1


def record_of(
    kinds: Mapping[str, Any], settings: Mapping[str, Any], load_before: float, **inputs: Path
) -> dict[str, Any]:
    """What the JSON of a benchmark of drafting holds.

    Args:
        kinds: what was measured of each kind of prompts.
        settings: the command's, `threads` among them.
        load_before: the load average as it began.
        inputs: folders and files by what they are, of which the last name is told.
    """
    return {
        "schema": _SCHEMA,
        "machine": describe_machine() | {"threads": settings["threads"]},
        "provenance": provenance(),
        "settings": {**settings, **{name: path.name for name, path in inputs.items()}},
        "load_average": [load_before, load_average()],
        "kinds": kinds,
    }


def counted(
    found: Mapping[str, Turns], counts: Callable[[list[dict[str, Any]]], dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Kind of prompts -> way -> its counts; `all` is of all kinds.

    Args:
        found: kind -> turns of every way.
        counts: of the turns of one way.
    """
    kinds = list(found.values())
    whole = {way: [turn for of in kinds for turn in of[way]] for way in kinds[0]}
    return {
        kind: {way: counts(turns) for way, turns in of.items()}
        for kind, of in {**found, "all": whole}.items()
    }


def drafters_of(model: DraftModel) -> dict[str, Callable[[], Drafter | None]]:
    """What drafts for an answer in each way."""
    return {PLAIN: lambda: None, STEADY: lambda: None, DRAFTED: lambda: model.begin(0)}


def in_turns(prompts: list[list[int]], turn: Callable[[str, list[int]], dict[str, Any]]) -> Turns:
    """Each prompt in all three ways, of which each comes first in turn.

    Args:
        prompts: token ids of each.
        turn: answers a prompt in a way, as `benchmarks.cpu.lookup.one_turn`.
    """
    turns: Turns = {way: [] for way in WAYS}
    for number, prompt in enumerate(prompts):
        for way in (*WAYS[number % 3 :], *WAYS[: number % 3]):
            turns[way].append(turn(way, prompt))
    return turns


def total(turns: Turns, way: str, name: str) -> float:
    """Sum of one figure over the answers of a way."""
    return sum(turn[name] for turn in turns[way])


def tokens_behind_prompts(turns: Turns) -> dict[str, int]:
    """Tokens of each way, without those that come with the prompt."""
    return {way: sum(max(0, len(turn["tokens"]) - 1) for turn in turns[way]) for way in WAYS}


def rates_of(turns: Turns) -> dict[str, Any]:
    """Tokens/s of each way over all answers, and how many answers are the same."""
    counts = tokens_behind_prompts(turns)
    rates = {way: counts[way] / total(turns, way, "seconds") for way in WAYS}

    def same(way: str) -> int:
        pairs = zip(turns[way], turns[DRAFTED], strict=True)
        return sum(one["tokens"] == other["tokens"] for one, other in pairs)

    return {
        "answers": len(turns[PLAIN]),
        "tokens": counts[DRAFTED],
        "tokens_per_s": rates,
        "ratio": rates[DRAFTED] / rates[PLAIN],
        "drafted": total(turns, DRAFTED, "drafted"),
        "taken": total(turns, DRAFTED, "taken"),
        "same_as_steady": same(STEADY),
        "same_as_plain": same(PLAIN),
    }


def tell(kind: str, found: Mapping[str, Any], model: DraftModel) -> None:
    """Say how much faster a kind of prompts is drafted.

    Raises:
        ValidationError: a drafted answer is another than without drafts.
    """
    note(f"{kind}: {found['ratio']:.2f} x; {model.take_notice() or 'drafting'}")
    if found["same_as_steady"] < found["answers"]:
        raise ValidationError("A drafted answer is another than without drafts.", where=kind)
