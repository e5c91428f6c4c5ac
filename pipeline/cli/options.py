"""Flags that several verbs share, so that they read the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model = click.option(
    "-m",
    "--model",
    default="smollm2-135m",
    show_default=True,
    help="Built-in alias, hub id, local folder or .gguf file.",
)
output = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
resume = click.option("--resume", is_flag=True, help="Continue an interrupted run.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
seed = click.option("--seed", type=int, default=0, show_default=True)
json_output = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)
trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Let the model's own Python code run."
)


def apply(*decorators: Decorator) -> Decorator:
    """One decorator out of several, applied so that help lists them in the order given."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate
