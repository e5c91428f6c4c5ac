"""`skipcat substitute`: a model in few bytes, ready to draft for the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.cli.compress import calibration_options, effort_option
from pipeline.export.contract import DEFAULT_MAX_LENGTH


@click.command("substitute", cls=options.GroupedCommand, rest="Model, output and run")
@click.argument("checkpoint")
@options.output
@click.option(
    "--memory",
    required=True,
    help="Bytes that all its weights may take, such as 60MB: ranks and bits are searched together.",
)
@click.option(
    "--target",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The export of CHECKPOINT, of the profile cpu, that it will draft for: the cache is as "
    "long, and the pair is tried. Excludes --max-length.",
)
@click.option(
    "--max-length",
    type=options.positive,
    help="Length of the cache, which has to be the target's. Excludes --target.  "
    f"[{DEFAULT_MAX_LENGTH}]",
)
@effort_option
@calibration_options
@options.trust_remote_code
@options.own_threads
@options.overwrite
@options.resume
@options.json_output
def command(
    checkpoint: str,
    output: Path,
    memory: str,
    target: Path | None,
    overwrite: bool,
    resume: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make a model that drafts for CHECKPOINT: in few bytes, and over the same cache.

    CHECKPOINT is what `skipcat compress -m` takes: an alias, a hub id, a folder or a .gguf file.
    It is compressed by the search over bits and ranks, and exported with the profile cpu.

    \b
    skipcat substitute smollm2-135m -o small --memory 60MB
    skipcat substitute ./my-llama -o small --memory 1GB --target my-llama-cpu
    skipcat run my-llama-cpu --draft small -p "What is a whale?"
    """  # noqa: D301 - click reads the escape
    from pipeline.substitute import build_substitute, for_model

    named = None if target is None else str(target)
    request = for_model(checkpoint, memory, target=named, **settings)
    record = build_substitute(request, output, overwrite=overwrite, resume=resume)
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    total_bytes = record["graph_bytes"] + record["data_bytes"]
    click.echo(
        f"{output}: {total_bytes / 1e6:.1f} MB of {memory}, {record['max_length']} tokens, "
        f"vocabulary of {record['vocab_size']:,}"
    )
    drafted = "TARGET" if target is None else str(target)
    click.echo(options.what_next(f'run {drafted} --draft {output} -p "..."'))
