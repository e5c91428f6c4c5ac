"""Decoding with a draft model over the same cache, against decoding token by token, in turns.

    python -m benchmarks.cpu.draft cpu-float cpu-int4 --text TEST.txt --questions QUESTIONS.jsonl

Both folders are exports of the profile `cpu`, and the prompts are those of `benchmarks.cpu.lookup`.
Each greedy answer is generated in three ways in one process: plain, as `skipcat run --no-lookup`
does; steady, with a second token beside each, which is what drafts are held to bit for bit; and
drafted, as `skipcat run --no-lookup --draft` does, or with `--lookup` as `skipcat run --draft`. It
fails where a drafted answer is not the steady one, and says how much slower than plain the kind of
prompts is, if any, that loses most.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.cpu.drafted_turns import (
    DRAFTED,
    PLAIN,
    STEADY,
    WAYS,
    Turns,
    drafters_of,
    in_turns,
    rates_of,
    record_of,
    tell,
)
from benchmarks.cpu.lookup import make_prompts, one_turn
from pipeline.artefact import write_json
from pipeline.bench.measure import load_average
from pipeline.progress import note, result_console
from pipeline.runtime.draft_model import open_drafted
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import load_tokenizer, stop_token_ids


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("draft", type=click.Path(path_type=Path, exists=True))
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--questions", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--length", type=int, help="Tokens of every draft; by default as many as pay.")
@click.option("--lookup", is_flag=True, help="Ask prompt lookup before the draft.")
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
    before = load_average()
    rows = _measure(folder, draft, make_prompts(folder, text, questions), **settings)
    inputs = {"folder": folder, "draft": draft, "text": text, "questions": questions}
    record = record_of(rows, settings, before, **inputs)
    record["least_ratio"] = min(of["ratio"] for of in rows.values())
    write_json(result, record)
    _show(rows)
    note(f"{record['least_ratio']:.2f} x plain where drafts give least")


def _measure(
    folder: Path,
    draft: Path,
    kinds: dict[str, list[list[int]]],
    length: int | None,
    lookup: bool,
    prompts: int,
    threads: int,
    new_tokens: int,
) -> dict[str, dict[str, Any]]:
    """All three ways over the prompts of each kind.

    Raises:
        ValidationError: a drafted answer is another than without drafts.
    """
    session, model = open_drafted(folder, draft, threads=threads, lookup=lookup, length=length)
    if model is None:
        raise click.ClickException("the draft is not opened: there is nothing to measure")
    plain = open_session(folder, threads=threads)
    decoding = Decoding(new_tokens, stop_ids=stop_token_ids(load_tokenizer(folder), folder))
    running: dict[str, Session] = {PLAIN: plain, STEADY: session, DRAFTED: session}
    begin = drafters_of(model)
    found = {}
    for kind, own in kinds.items():
        turns = in_turns(
            own[:prompts],
            lambda way, prompt: one_turn(running[way], prompt, decoding, begin[way]()),
        )
        found[kind] = _summary(turns)
        tell(kind, found[kind], model)
    return found


def _summary(turns: Turns) -> dict[str, Any]:
    """Tokens/s of each way over all answers, tokens a call, and how many answers are the same."""
    found = rates_of(turns)
    return found | {
        "tokens_per_call": found["tokens"] / max(1, found["tokens"] - found["taken"]),
        "longest_answer": max(len(turn["tokens"]) for turn in turns[DRAFTED]),
        "median_seconds": {
            way: statistics.median(turn["seconds"] for turn in turns[way]) for way in WAYS
        },
    }


def _show(rows: dict[str, dict[str, Any]]) -> None:
    """The table."""
    table = Table("prompts", *WAYS, "ratio", "tokens a call", "taken", "as steady", "as plain")
    for kind, of in rows.items():
        table.add_row(
            kind,
            *(f"{of['tokens_per_s'][way]:.1f}" for way in WAYS),
            f"{of['ratio']:.2f}",
            f"{of['tokens_per_call']:.2f}",
            f"{of['taken']} of {of['drafted']}",
            f"{of['same_as_steady']} of {of['answers']}",
            f"{of['same_as_plain']} of {of['answers']}",
        )
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
