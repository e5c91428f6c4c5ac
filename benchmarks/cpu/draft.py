"""Decoding with a draft model over the same cache, against decoding token by token, in turns.

    python -m benchmarks.cpu.draft cpu-float cpu-int4 --text TEST.txt --questions QUESTIONS.jsonl

Both folders are exports of the profile `cpu`, and the prompts are those of `benchmarks.cpu.lookup`.
Each greedy answer is generated in three ways in one process: plain, as `skipcat run --no-lookup`
does; steady, with a second token beside each, which is what drafts are held to bit for bit; and
drafted, as `skipcat run --no-lookup --draft` does. It fails where a drafted answer is not the
steady one.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.cpu.lookup import make_prompts, one_turn
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.errors import ValidationError
from pipeline.progress import note, result_console
from pipeline.provenance import provenance
from pipeline.runtime.draft_model import open_drafted
from pipeline.runtime.drafting import Drafter
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import load_tokenizer, stop_token_ids

_SCHEMA = 1
_PLAIN, _STEADY, _DRAFTED = "plain", "steady", "drafted"
_WAYS = (_PLAIN, _STEADY, _DRAFTED)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("draft", type=click.Path(path_type=Path, exists=True))
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--questions", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--length", type=int, help="Tokens of every draft; by default as many as pay.")
@click.option("--prompts", type=int, default=8, show_default=True, help="Of each kind.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--new-tokens", type=int, default=128, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=RESULTS / "draft.json")
def command(
    folder: Path,
    draft: Path,
    text: Path,
    questions: Path,
    result: Path,
    **settings: Any,
) -> None:
    """Measure tokens/s and tokens a call with and without a draft model."""
    loads = [load_average()]
    rows = _measure(folder, draft, make_prompts(folder, text, questions), **settings)
    record = {
        "schema": _SCHEMA,
        "machine": describe_machine() | {"threads": settings["threads"]},
        "provenance": provenance(),
        "settings": settings
        | {"folder": folder.name, "draft": draft.name}
        | {"text": text.name, "questions": questions.name},
        "load_average": [*loads, load_average()],
        "kinds": rows,
    }
    write_json(result, record)
    _show(rows)


def _measure(
    folder: Path,
    draft: Path,
    kinds: dict[str, list[list[int]]],
    length: int | None,
    prompts: int,
    threads: int,
    new_tokens: int,
) -> dict[str, dict[str, Any]]:
    """All three ways over the prompts of each kind.

    Raises:
        ValidationError: a drafted answer is another than without drafts.
    """
    session, model = open_drafted(folder, draft, threads=threads, length=length)
    if model is None:
        raise click.ClickException("the draft is not opened: there is nothing to measure")
    plain = open_session(folder, threads=threads)
    decoding = Decoding(new_tokens, stop_ids=stop_token_ids(load_tokenizer(folder), folder))
    ways: dict[str, tuple[Session, Callable[[], Drafter | None]]] = {
        _PLAIN: (plain, lambda: None),
        _STEADY: (session, lambda: None),
        _DRAFTED: (session, lambda: model.begin(0)),
    }
    found = {}
    for kind, own in kinds.items():
        turns: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
        for number, prompt in enumerate(own[:prompts]):
            for way in (*_WAYS[number % 3 :], *_WAYS[: number % 3]):  # each comes first in turn
                running, begin = ways[way]
                turns[way].append(one_turn(running, prompt, decoding, begin()))
        found[kind] = _summary(turns)
        note(f"{kind}: {found[kind]['ratio']:.2f} x; {model.take_notice() or 'drafting'}")
        if found[kind]["same_as_steady"] < len(turns[_DRAFTED]):
            raise ValidationError("A drafted answer is another than without drafts.", where=kind)
    return found


def _summary(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Tokens/s of each way over all answers, tokens a call, and how many answers are the same."""
    counts = {way: sum(max(0, len(t["tokens"]) - 1) for t in turns[way]) for way in _WAYS}
    rates = {way: counts[way] / sum(turn["seconds"] for turn in turns[way]) for way in _WAYS}
    drafted, taken = (sum(turn[name] for turn in turns[_DRAFTED]) for name in ("drafted", "taken"))

    def same(way: str) -> int:
        pairs = zip(turns[way], turns[_DRAFTED], strict=True)
        return sum(one["tokens"] == other["tokens"] for one, other in pairs)

    return {
        "answers": len(turns[_PLAIN]),
        "tokens": counts[_DRAFTED],
        "tokens_per_s": rates,
        "ratio": rates[_DRAFTED] / rates[_PLAIN],
        "tokens_per_call": counts[_DRAFTED] / max(1, counts[_DRAFTED] - taken),
        "drafted": drafted,
        "taken": taken,
        "same_as_steady": same(_STEADY),
        "same_as_plain": same(_PLAIN),
        "longest_answer": max(len(turn["tokens"]) for turn in turns[_DRAFTED]),
        "median_seconds": {
            way: statistics.median(turn["seconds"] for turn in turns[way]) for way in _WAYS
        },
    }


def _show(rows: dict[str, dict[str, Any]]) -> None:
    """The table."""
    table = Table("prompts", *_WAYS, "ratio", "tokens a call", "taken", "as steady", "as plain")
    for kind, of in rows.items():
        table.add_row(
            kind,
            *(f"{of['tokens_per_s'][way]:.1f}" for way in _WAYS),
            f"{of['ratio']:.2f}",
            f"{of['tokens_per_call']:.2f}",
            f"{of['taken']} of {of['drafted']}",
            f"{of['same_as_steady']} of {of['answers']}",
            f"{of['same_as_plain']} of {of['answers']}",
        )
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
