"""`skipcat evaluate MODEL`: task scores, perplexity, closeness to another model, sample answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.artefact import write_json
from pipeline.cli import options
from pipeline.errors import UsageError
from pipeline.output import check_output_file

_task_options = options.apply(
    click.option(
        "--tasks",
        multiple=True,
        help="Names of lm-evaluation-harness tasks, or .jsonl files of multiple-choice questions; "
        "comma separated, repeatable.",
    ),
    click.option("--limit", type=options.positive, help="Only the first questions of each task."),
    click.option("--num-fewshot", type=options.count, help="[the task's own]"),
    options.setting(
        "--batch-size", 4, "Rows of a task that run at once.", options.positive, name="max_rows"
    ),
)
_text_options = options.apply(
    click.option("--text", type=click.Path(path_type=Path), help="UTF-8 file, for perplexity."),
    options.setting("--windows", 10, "Windows of --text.", options.positive),
    options.setting("--window-length", 2048, "Tokens in each.", options.window_length),
    click.option("--reference", help="Also KL to this model and top-1 agreement, over --text."),
)
_prompt_options = options.apply(
    click.option("-p", "--prompt", "prompts", multiple=True, help="Show the answer; repeatable."),
    click.option("--raw", is_flag=True, help="Give prompts as they are, without chat template."),
    options.setting("--max-new-tokens", 64, "Of each answer.", options.positive),
)


@click.command("evaluate")
@click.argument("model")
@options.backend
@options.threads
@options.workers
@_task_options
@_text_options
@_prompt_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON file to write.")
@options.overwrite
@options.trust_remote_code
@options.json_output
def command(
    tasks: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    workers: str | None,
    **settings: Any,
) -> None:
    """Score MODEL: an ONNX folder, a checkpoint folder, an alias, a hub id or a .gguf file.

    Tasks are scored by EleutherAI's lm-evaluation-harness. Each line of a .jsonl file holds
    question, choices and answer (from 0), and is scored as ARC is.

    \b
      skipcat evaluate build/onnx --tasks arc_easy.jsonl,hellaswag
      skipcat evaluate build/checkpoint --text test.txt --reference smollm2-135m
      skipcat evaluate build/checkpoint --text test.txt --workers local:4
    """  # noqa: D301 - click reads the escape
    if output is not None:
        check_output_file(output, overwrite=overwrite)

    from pipeline.progress import note
    from pipeline.workers.workers import open_workers
    from validate.evaluate import EvaluateRequest, evaluate

    request = EvaluateRequest(tasks=_split_names(tasks), **settings)
    _require_text_for_workers(request.text, workers)
    with open_workers(workers) as own:
        record = evaluate(request, note, own)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, record)
    if as_json:
        click.echo(json.dumps(record, indent=2))
    else:
        _show(record)
    if output is not None:
        note(f"wrote {output}")


def _require_text_for_workers(text: Path | None, workers: str | None) -> None:
    """Refuse workers that would have nothing to do: tasks and answers are this process's."""
    if workers is not None and text is None:
        raise UsageError(
            "Workers measure windows of a text, and none is given.",
            where=f"--workers {workers}",
            change="pass --text, or leave --workers out",
        )


def _split_names(values: tuple[str, ...]) -> tuple[str, ...]:
    """`("a,b", "c")` -> `("a", "b", "c")`."""
    return tuple(name.strip() for value in values for name in value.split(",") if name.strip())


def _show(record: dict[str, Any]) -> None:
    """The numbers as a table on stdout, and below it the answers."""
    from rich.table import Table

    from pipeline.progress import result_console

    console = result_console()
    rows = _score_rows(record)
    if rows:
        table = Table(title=f"{record['model']}, {record['backend']}")
        table.add_column("measured")
        for heading in ("value", "standard error", "over"):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for answer in record["answers"]:
        console.print(f"> {answer['prompt']}", style="bold")
        console.print(answer["text"], soft_wrap=True)
        if answer["ended"] != "stop":
            console.print(f"[cut after {answer['new_tokens']} tokens]")


def _score_rows(record: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What was measured, value, standard error, and over how much of what."""
    rows = []
    for score in (record["tasks"] or {"scores": []})["scores"]:
        count = "" if score["samples"] is None else f"{score['samples']} questions"
        rows.append((f"{score['task']}, {score['metric']}", *_cells(score, "{:.4f}"), count))
    if record["perplexity"]:
        over = f"{record['settings']['windows']} x {record['settings']['window_length']} tokens"
        rows.append(("perplexity", *_cells(record["perplexity"], "{:.3f}"), over))
        rows += [(*row, over) for row in _closeness_rows(record["reference"])]
    return rows


def _closeness_rows(reference: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """What was measured against the reference."""
    if reference is None:
        return []
    name = reference["model"]
    return [
        (f"perplexity of {name}", *_cells(reference["perplexity"], "{:.3f}")),
        ("change of log-perplexity", *_cells(reference["log_perplexity_change"], "{:+.4f}")),
        (f"KL to {name}, nats per token", *_cells(reference["kl"], "{:.4f}")),
        (f"top-1 agreement with {name}", *_cells(reference["top1"], "{:.2%}")),
    ]


def _cells(entry: dict[str, Any], form: str) -> tuple[str, str]:
    """A value and its standard error as text."""
    error = entry["standard_error"]
    unsigned = form.replace("+", "")
    return form.format(entry["value"]), "-" if error is None else unsigned.format(error)
