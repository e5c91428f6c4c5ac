"""`skipcat bench --draft`: what a draft gives and takes, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pipeline.errors import UsageError
from pipeline.json_file import read_text_file

if TYPE_CHECKING:
    from rich.table import Table

# What is for measurements without a draft.
_OTHERS = ("shapes", "predict", "plot", "prompt_tokens", "context", "device")


def measured_drafting(
    folders: tuple[Path, ...],
    draft: Path | None,
    *,
    memory: str | None,
    draft_tokens: int | None,
    draft_width: int | None,
    prompts: Path | None,
    verbose: bool,
) -> dict[str, Any]:
    """Measure a model plain and drafted, and its draft alone, and print the table.

    The command's other settings are read from where click has them.

    Args:
        folders: the model alone.
        draft: of it.
        memory: as of `DraftedTarget`.
        draft_tokens: likewise, `length`.
        draft_width: likewise, `width`.
        prompts: a file of them, a line each; or None.
        verbose: say what each turn measured.

    Raises:
        UsageError: flags that do not go together.
    """
    context = click.get_current_context()
    _require_sensible(context, folders, draft)
    assert draft is not None
    from pipeline.bench.drafting import PROMPTS, DraftedTarget, measure_drafting
    from pipeline.machine import usable_cores
    from pipeline.progress import note, result_console

    settings = context.params
    threads = settings["threads"] or usable_cores()
    how = memory, draft_tokens, draft_width, threads
    target = DraftedTarget(folders[0].resolve(), draft.resolve(), *how)
    texts = PROMPTS if prompts is None else _lines(prompts)
    rounds = settings["rounds"]
    tell = note if verbose else lambda text: None
    record = measure_drafting(target, texts, settings["new_tokens"], rounds, tell)
    result_console().print(_table(record))
    for line in _remarks(record):
        note(line)
    return record


def _require_sensible(
    context: click.Context, folders: tuple[Path, ...], draft: Path | None
) -> None:
    """Raise UsageError for flags that do not go together."""
    if draft is None:
        flags = "--memory, --draft-tokens, --draft-width and --prompts"
        raise UsageError(f"{flags} are for --draft.")
    for name in _OTHERS:
        is_given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and not (name == "device" and context.params[name] != "cuda"):
            flag = "--shape" if name == "shapes" else "--" + name.replace("_", "-")
            raise UsageError(f"{flag} does not go with --draft.", change=f"leave {flag} out")
    if len(folders) != 1:
        raise UsageError(
            "A draft is measured with one model.",
            observed=f"{len(folders)} folders",
            change="name the folder that it drafts for",
        )


def _lines(path: Path) -> list[str]:
    """The lines of a file that are not blank; raise UsageError where there are none."""
    lines = [line for line in read_text_file(path).split("\n") if line.strip()]
    if not lines:
        raise UsageError("There is no prompt in this file.", where=path, expected="one a line")
    return lines


def _table(record: dict[str, Any]) -> Table:
    """One row a way."""
    from rich.table import Table

    settings = record["settings"]
    budget = "" if settings["memory"] is None else f" in {settings['memory']}"
    table = Table(
        title=f"measured on {record['machine']['cpu']}, {settings['threads']} threads: "
        f"{settings['folder']}{budget}, drafted for by {settings['draft']}; "
        f"{settings['prompts']} prompts, up to {settings['new_tokens']} tokens each",
        title_justify="left",
    )
    table.add_column("way", no_wrap=True)
    table.add_column("session", overflow="fold")
    for heading in (
        "tokens/s", "lowest to\nhighest", "first\ntoken, s", "tokens\na call", "MB read\na token",
        "draft", "waiting\nfor disk", "verifying", "peak\nMB",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in record["rows"]:
        rate, shares, read = row["tokens_per_s"], row["shares"], row["read_bytes_per_token"]
        table.add_row(
            row["way"],
            row["session"],
            f"{rate['median']:,.2f}",
            f"{rate['min']:,.2f} to {rate['max']:,.2f}",
            f"{row['first_token_s']['median']:.2f}",
            f"{row['tokens_per_call']:.2f}",
            "" if read is None else f"{read / 1e6:,.2f}",
            *(f"{shares[name]:.0%}" for name in ("draft", "wait", "verify")),
            f"{row['peak_bytes'] / 1e6:,.0f}",
        )
    return table


def _remarks(record: dict[str, Any]) -> list[str]:
    """What the table has no room for."""
    drafted = next(row for row in record["rows"] if row["acceptance"] or row["way"] == "drafted")
    by_depth = ", ".join(f"{of['depth']}: {of['share']:.0%}" for of in drafted["acceptance"])
    found = [
        f"drafted is {record['ratio']:.2f} x plain; {record['same_as_plain']} of "
        f"{record['answers']} answers are the plain ones, token for token",
        f"{drafted['taken']} of {drafted['drafted']} draft tokens were right; by depth {by_depth}"
        if by_depth
        else "nothing was drafted",
    ]
    if any(of["branches"] > 1 for of in drafted["branches"]):
        calls = sum(of["calls"] for of in drafted["branches"])
        shares = [f"{of['branches']}: {of['calls'] / calls:.0%}" for of in drafted["branches"]]
        found.append(f"calls with drafts, by their branches {', '.join(shares)}")
    if alone := record["draft_alone"]:
        found.append(
            f"the draft alone: KL {alone['kl_mean']:.4f} nats a token, and the model's likeliest "
            f"token in {alone['top1_agreement']:.1%}, over {alone['tokens']} tokens"
        )
    return found
