"""Chains and trees of draft tokens in turns, for a checkpoint that is streamed from disk.

    python -m benchmarks.cpu.trees TARGET SUB --memory 360MB --text TEST.txt \
        --questions QUESTIONS.jsonl

TARGET is a checkpoint and SUB an export of it that drafts. Each greedy answer is drafted for by
chains and by trees, as many tokens as pay and 16 in every call; each way comes first in turn. The
prompts are those of `benchmarks.cpu.lookup`. It fails where two ways answer differently.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.cpu.drafted_turns import counted, record_of
from benchmarks.cpu.lookup import make_prompts, one_turn
from pipeline.artefact import write_json
from pipeline.bench.measure import load_average
from pipeline.errors import ValidationError
from pipeline.progress import note, result_console
from pipeline.runtime.draft_costs import MOST_DRAFTED
from pipeline.runtime.draft_model import DraftModel
from pipeline.runtime.offload.open_offloaded import open_offloaded
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.tokenizer import load_tokenizer, stop_token_ids

# Tokens of every draft, and guesses at a place.
_WAYS: dict[str, tuple[int | None, int | None]] = {
    "chains": (None, 1),
    "trees": (None, None),
    f"chains of {MOST_DRAFTED}": (MOST_DRAFTED, 1),
    f"trees of {MOST_DRAFTED}": (MOST_DRAFTED, None),
}
_Counts = dict[str, float]


@click.command()
@click.argument("target", type=click.Path(path_type=Path, exists=True))
@click.argument("draft", type=click.Path(path_type=Path, exists=True))
@click.option("--memory", required=True, help="Budget, such as 360MB.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--questions", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--prompts", type=int, default=8, show_default=True, help="Of each kind.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--new-tokens", type=int, default=64, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULTS / "trees.json")
def command(
    target: Path, draft: Path, text: Path, questions: Path, result: Path, **settings: Any
) -> None:
    """Count tokens a call of each way over the prompts of each kind."""
    before = load_average()
    kinds = _measure(target, draft, make_prompts(draft, text, questions), **settings)
    inputs = {"target": target, "draft": draft, "text": text, "questions": questions}
    write_json(result, record_of(kinds, settings, before, **inputs))
    _show(kinds)


def _measure(
    target: Path,
    draft: Path,
    kinds: dict[str, list[list[int]]],
    memory: str,
    prompts: int,
    threads: int,
    new_tokens: int,
) -> dict[str, dict[str, _Counts]]:
    """Kind -> way -> its counts; `all` is of all kinds.

    Raises:
        ValidationError: two ways answer differently.
    """
    torch.set_num_threads(threads)
    session, model = open_offloaded(target, memory, draft, threads=threads)
    assert model is not None
    ways = {way: DraftModel(session, model._session, False, *how) for way, how in _WAYS.items()}
    decoding = Decoding(new_tokens, stop_ids=stop_token_ids(load_tokenizer(target), target))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind, asked in kinds.items():
        found[kind] = {way: [] for way in ways}
        for number, prompt in enumerate(asked[:prompts]):
            first = number % len(ways)
            for way in (*list(ways)[first:], *list(ways)[:first]):
                before = session.traffic.passes
                turn = one_turn(session, prompt, decoding, ways[way].begin(0))
                calls = session.traffic.passes - before - 1  # the prompt's
                found[kind][way].append(turn | {"calls": calls})
            if len({tuple(turns[-1]["tokens"]) for turns in found[kind].values()}) > 1:
                raise ValidationError("Two ways of drafting answer differently.", where=kind)
        note(f"{kind}: { ({way: _counts(turns) for way, turns in found[kind].items()}) }")
    return counted(found, _counts)


def _counts(turns: list[dict[str, Any]]) -> _Counts:
    """Tokens behind the first, calls for them, draft tokens a call, and rates."""
    tokens = sum(max(0, len(turn["tokens"]) - 1) for turn in turns)
    calls = sum(turn["calls"] for turn in turns)
    seconds = sum(turn["seconds"] for turn in turns)
    return {
        "tokens": tokens,
        "calls": calls,
        "drafted_per_call": sum(turn["drafted"] for turn in turns) / calls,
        "tokens_per_call": tokens / calls,
        "tokens_per_s": tokens / seconds,
    }


def _show(kinds: dict[str, dict[str, _Counts]]) -> None:
    """The table: tokens a call, and tokens/s."""
    table = Table("prompts", *_WAYS)
    for kind, of in kinds.items():
        cells = [f"{o['tokens_per_call']:.2f} ({o['tokens_per_s']:.2f}/s)" for o in of.values()]
        table.add_row(kind, *cells)
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
