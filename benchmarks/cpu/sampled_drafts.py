"""How many draft tokens are right: greedily, and sampled by each noise, and without a common one.

    python -m benchmarks.cpu.sampled_drafts cpu-float cpu-int4 --text TEST.txt \
        --questions QUESTIONS.jsonl

Both folders are exports of the profile `cpu`, or with `--memory` the first is a checkpoint; the
prompts are those of `benchmarks.cpu.lookup`. Every call has drafts of the same length, so that what
is counted, tokens a call, depends on no clock. Uncoupled, the draft guesses its likeliest token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.cpu.drafted_turns import counted, record_of
from benchmarks.cpu.lookup import make_prompts, one_turn
from pipeline.artefact import write_json
from pipeline.bench.measure import load_average
from pipeline.progress import note, result_console
from pipeline.runtime.draft_costs import MOST_DRAFTED
from pipeline.runtime.drafting import Drafter
from pipeline.runtime.open_answering import open_helped
from pipeline.runtime.sampling import GREEDY, NOISES, Sampling
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.tokenizer import load_tokenizer, stop_token_ids

_GREEDY, _UNCOUPLED = "greedy", "uncoupled"


class _Uncoupled:
    """A drafter that does not hear how the answer chooses."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.drafted = self.taken = 0

    def learn(self, drafted: Sequence[int], chosen: Sequence[int]) -> None:
        self._drafter.learn(drafted, chosen)
        self.taken = self._drafter.taken

    def draft(self, most: int) -> Sequence[int]:
        found = self._drafter.draft(most)
        self.drafted = self._drafter.drafted
        return found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("draft", type=click.Path(path_type=Path, exists=True))
@click.option("--memory", help="Of a checkpoint: what it may take, such as 120MB.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--questions", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--length", type=int, default=MOST_DRAFTED, show_default=True, help="Of a draft.")
@click.option("--width", type=int, help="Most guesses at one place; 1 drafts chains.")
@click.option("--temperature", type=float, default=0.7, show_default=True)
@click.option("--prompts", type=int, default=8, show_default=True, help="Of each kind.")
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--new-tokens", type=int, default=64, show_default=True)
@click.option(
    "--json", "result", type=click.Path(path_type=Path), default=RESULTS / "sampled-drafts.json"
)
def command(
    folder: Path, draft: Path, text: Path, questions: Path, result: Path, **settings: Any
) -> None:
    """Count tokens a call of each way over the prompts of each kind."""
    before = load_average()
    kinds = _measure(folder, draft, make_prompts(draft, text, questions), **settings)
    inputs = {"folder": folder, "draft": draft, "text": text, "questions": questions}
    write_json(result, record_of(kinds, settings, before, **inputs))
    _show(kinds)


def _measure(
    folder: Path,
    draft: Path,
    kinds: dict[str, list[list[int]]],
    memory: str | None,
    length: int,
    width: int | None,
    temperature: float,
    prompts: int,
    threads: int,
    new_tokens: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Kind -> way -> its counts; `all` is of all kinds."""
    how: dict[str, Any] = {"threads": threads, "memory": memory, "length": length, "width": width}
    session, model = open_helped(folder, draft, **how)
    assert model is not None
    stop_ids = stop_token_ids(load_tokenizer(draft), draft)
    ways = {_GREEDY: GREEDY, _UNCOUPLED: Sampling(temperature)}
    ways |= {noise: Sampling(temperature, noise=noise) for noise in NOISES}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind, asked in kinds.items():
        found[kind] = {way: [] for way in ways}
        for number, prompt in enumerate(asked[:prompts]):
            for way, sampling in ways.items():
                drafter = model.begin(0)
                own = _Uncoupled(drafter) if way == _UNCOUPLED else drafter
                decoding = Decoding(new_tokens, sampling, stop_ids, seed=number)
                found[kind][way].append(one_turn(session, prompt, decoding, own))
        note(f"{kind}: {_counts(found[kind][_GREEDY])}")
    return counted(found, _counts)


def _counts(turns: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens behind the first of each answer, calls for them, and draft tokens."""
    tokens = sum(max(0, len(turn["tokens"]) - 1) for turn in turns)
    taken = sum(turn["taken"] for turn in turns)
    return {
        "tokens": tokens,
        "drafted": sum(turn["drafted"] for turn in turns),
        "taken": taken,
        "tokens_per_call": tokens / max(1, tokens - taken),
    }


def _show(kinds: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table."""
    ways = list(kinds["all"])
    table = Table("prompts", *(f"{way}\ntokens a call" for way in ways), "of greedy's")
    for kind, of in kinds.items():
        calls = [of[way]["tokens_per_call"] for way in ways]
        shares = ", ".join(f"{rate / calls[0]:.0%}" for rate in calls[1:])
        table.add_row(kind, *(f"{rate:.2f}" for rate in calls), shares)
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
