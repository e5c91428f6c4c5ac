"""Prompt-lookup decoding against decoding token by token, in turns in one process.

    python -m benchmarks.cpu.lookup cpu-offset cpu-int8 --text TEST.txt \
        --questions QUESTIONS.jsonl

Folders are exports of the profile `cpu`. What drafts give depends on how much repeats, so three
kinds of prompts are measured: `text` goes on with an article, as the base model does, and soon runs
in circles; `ask` puts questions to the chat model; `edit` has it rewrite, shorten or quote a
passage. Each answer is generated both ways, greedily. The texts were not used to choose the
constants of `pipeline/runtime/drafting.py`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.progress import note, result_console
from pipeline.provenance import provenance
from pipeline.runtime.drafting import PROMPT_LOOKUP, Drafter, make_drafter
from pipeline.runtime.generate import generate
from pipeline.runtime.prefix_cache import common_length
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import chat_prompt_ids, load_tokenizer, stop_token_ids

_SCHEMA = 1
_RESULT = RESULTS / "lookup.json"
_PROMPTS_PER_KIND = 8
_TEXT_TOKENS = 128
_PASSAGE_CHARACTERS = 1000
_EDITS = (
    "Repeat this text, and correct its spelling:",
    "Rewrite this in the present tense:",
    "Summarise this text in three sentences:",
    "Quote the most important sentences of this text:",
)
_ROWS = (1, 2, 3, 4, 6, 8, 12)
ROW_CONTEXT, ROW_REPETITIONS = 128, 15


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--questions", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--new-tokens", type=int, default=128, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    folders: tuple[Path, ...],
    text: Path,
    questions: Path,
    threads: int,
    new_tokens: int,
    result: Path,
) -> None:
    """Measure tokens/s with and without drafts, and what a further row of a call costs."""
    loads = [load_average()]
    rows = [
        {"folder": folder.name, **_measure(folder, text, questions, threads, new_tokens)}
        for folder in folders
    ]
    record = {
        "schema": _SCHEMA,
        "machine": describe_machine() | {"threads": threads},
        "provenance": provenance(),
        "settings": {
            "new_tokens": new_tokens,
            "prompts_per_kind": _PROMPTS_PER_KIND,
            "text": text.name,
            "questions": questions.name,
        },
        "load_average": [*loads, load_average()],
        "rows": rows,
    }
    write_json(result, record)
    _show(rows)


def _measure(
    folder: Path, text: Path, questions: Path, threads: int, new_tokens: int
) -> dict[str, Any]:
    """Both ways over all prompts of one folder."""
    session = open_session(folder, threads=threads)
    if session.row_cost is None:
        raise click.ClickException(f"{folder} is no export of the profile cpu")
    decoding = Decoding(new_tokens, stop_ids=stop_token_ids(load_tokenizer(folder), folder))
    kinds = {}
    for kind, prompts in make_prompts(folder, text, questions).items():
        pairs = []
        for number, prompt in enumerate(prompts):
            # Each way comes first in turn.
            ways = (False, True) if number % 2 else (True, False)
            turns = {}
            for way in ways:
                drafter = make_drafter(session, PROMPT_LOOKUP if way else None)
                turns[way] = one_turn(session, prompt, decoding, drafter)
            pairs.append((turns[False], turns[True]))
        kinds[kind] = _summary(pairs)
        note(f"{folder.name}, {kind}: {kinds[kind]['ratio']:.2f} x")
    return {"backend": session.name, "row_costs": _row_costs(session), "kinds": kinds}


def make_prompts(folder: Path, text: Path, questions: Path) -> dict[str, list[list[int]]]:
    """Ids of the prompts of each kind."""
    tokenizer = load_tokenizer(folder)
    articles = text.read_text(encoding="utf-8")
    step = len(articles) // _PROMPTS_PER_KIND
    passages = [articles[k * step :][:_PASSAGE_CHARACTERS] for k in range(_PROMPTS_PER_KIND)]
    lines = questions.read_text(encoding="utf-8").splitlines()[:_PROMPTS_PER_KIND]
    edits = [f"{_EDITS[k % len(_EDITS)]}\n\n{passage}" for k, passage in enumerate(passages)]

    def chat(content: str) -> list[int]:
        return chat_prompt_ids(tokenizer, [{"role": "user", "content": content}])

    return {
        "text": [tokenizer.encode(p, add_special_tokens=False)[:_TEXT_TOKENS] for p in passages],
        "ask": [chat(json.loads(line)["question"]) for line in lines],
        "edit": [chat(edit) for edit in edits],
    }


def one_turn(
    session: Session, prompt: list[int], decoding: Decoding, drafter: Drafter | None
) -> dict[str, Any]:
    """One answer: its tokens, the seconds of all after the first, and what was drafted."""
    tokens, times = [], []
    for token in generate(session, prompt, decoding, drafter):
        times.append(time.perf_counter())
        tokens.append(token)
    return {
        "tokens": tokens,
        "seconds": times[-1] - times[0] if times else 0.0,
        "drafted": drafter.drafted if drafter else 0,
        "taken": drafter.taken if drafter else 0,
    }


def _summary(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Tokens/s of both ways over all answers of at least two tokens, and what became of drafts."""
    pairs = [pair for pair in pairs if min(len(turn["tokens"]) for turn in pair) > 1]
    rates = [
        sum(len(turn["tokens"]) - 1 for turn in turns) / sum(turn["seconds"] for turn in turns)
        for turns in zip(*pairs, strict=True)
    ]
    equal = [
        common_length(plain["tokens"], drafted["tokens"]) / len(plain["tokens"])
        for plain, drafted in pairs
    ]
    return {
        "answers": len(pairs),
        "tokens": sum(len(plain["tokens"]) for plain, _ in pairs),
        "plain_tokens_per_s": rates[0],
        "lookup_tokens_per_s": rates[1],
        "ratio": rates[1] / rates[0],
        "ratio_of_each": [
            (len(drafted["tokens"]) - 1)
            / drafted["seconds"]
            / ((len(plain["tokens"]) - 1) / plain["seconds"])
            for plain, drafted in pairs
        ],
        "drafted": sum(drafted["drafted"] for _, drafted in pairs),
        "taken": sum(drafted["taken"] for _, drafted in pairs),
        "same_beginning": statistics.mean(equal),
        "same_answers": sum(share == 1 for share in equal),
    }


def _row_costs(session: Session) -> dict[str, float]:
    """What each further row of a call costs, as a share of a call of one: rows -> share."""
    ids = np.arange(ROW_CONTEXT + max(_ROWS))[None] % session.vocab_size
    session.reset()
    session.forward(ids[:, :ROW_CONTEXT], last_only=True)
    seconds: dict[int, list[float]] = {count: [] for count in _ROWS}
    for _ in range(ROW_REPETITIONS):
        for count in _ROWS:
            session.rewind(ROW_CONTEXT)
            started = time.perf_counter()
            session.forward(ids[:, ROW_CONTEXT : ROW_CONTEXT + count])
            seconds[count].append(time.perf_counter() - started)
    medians = {count: statistics.median(values) for count, values in seconds.items()}
    return {str(n): (medians[n] / medians[1] - 1) / (n - 1) for n in _ROWS if n > 1}


def _show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("folder", "prompts", "plain", "lookup", "ratio", "taken", "same answers")
    for row in rows:
        for kind, of in row["kinds"].items():
            table.add_row(
                row["folder"],
                kind,
                f"{of['plain_tokens_per_s']:.1f}",
                f"{of['lookup_tokens_per_s']:.1f}",
                f"{of['ratio']:.2f}",
                f"{of['taken']} of {of['drafted']}",
                f"{of['same_answers']} of {of['answers']}",
            )
        costs = ", ".join(f"{n}: {cost:.2f}" for n, cost in row["row_costs"].items())
        note(f"{row['folder']}: a further row of a call costs {costs}")
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
