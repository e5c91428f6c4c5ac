"""Flags that several commands share, so that they read the same everywhere, and their headings."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.machine import limited_threads
from pipeline.runtime.sessions.open_session import BACKENDS

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def what_next(*commands: str) -> str:
    """What may be done next, as this user can type it: `skipcat` may lie beside Python alone.

    Args:
        commands: without the program's name, such as `run FOLDER`.
    """
    beside = Path(sys.executable).with_name("skipcat")
    known = shutil.which("skipcat") or not beside.exists()
    program = "skipcat" if known else os.path.relpath(beside)
    return "next: " + "   or   ".join(f"{program} {command}" for command in commands)


def setting(
    flag: str,
    default: Any,
    help: str,
    type: click.ParamType | None = None,
    name: str | None = None,
) -> _Decorator:
    """An option that has a default, and whose help shows it.

    Args:
        flag: as it is typed.
        default: its type is the option's, unless another is given.
        help: of the option.
        type: click's, of a range or choice.
        name: of the command's argument; None is the flag's.
    """
    names = (flag,) if name is None else (flag, name)
    return click.option(*names, type=type, default=default, show_default=True, help=help)


class _Finite(click.FloatRange):
    """A range of numbers; click's own lets through what is no number, and infinities."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


# What a C int holds: libraries take no more.
_LARGEST = 2**31 - 1
count = click.IntRange(0, _LARGEST)
positive = click.IntRange(1, _LARGEST)
window_length = click.IntRange(2, _LARGEST)
number = _Finite()
rate = _Finite(min=0, min_open=True)
# Seconds: a thread cannot wait longer.
not_negative = _Finite(min=0, max=1e9)
above_zero = _Finite(min=0, max=1e9, min_open=True)
one_or_more = _Finite(min=1, max=1e9)
folder = click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
backend = setting(
    "--backend", "auto", "What runs it; auto: what the folder is for.", click.Choice(BACKENDS)
)
# More would be made without a word, until the machine has no more.
thread_count = click.IntRange(1, 1024)


def _limit_threads(
    context: click.Context, option: click.Parameter, count: int | None
) -> int | None:
    """Let the command compute with so many threads, until its context is left."""
    if count is not None:
        context.with_resource(limited_threads(count))
    return count


def _threads(*, exposed: bool) -> _Decorator:
    return click.option(
        "--threads",
        type=thread_count,
        callback=_limit_threads,
        expose_value=exposed,
        help="Threads that compute: PyTorch's and ONNX Runtime's.  [one to a physical core]",
    )


# Of commands that hand the number on to sessions, and of those that only compute with it.
threads, own_threads = _threads(exposed=True), _threads(exposed=False)
workers = click.option(
    "--workers",
    metavar="PLACE",
    help="Let other processes compute what is independent, through Ray: local:4 begins four here "
    "(local: one to a physical core), ray://HOST:10001 uses a cluster's, auto those of the cluster "
    "that this machine belongs to. Each computes with --threads [1], and so does this process: "
    "with as many threads the bytes are the same as without.",
)
draft = click.option(
    "--draft",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="An export of the same model in fewer bytes, which drafts over the same cache "
    "(speculative decoding). No bit of an answer depends on the drafts. Of the profile cpu, as "
    "FOLDER is, unless --memory or --vram makes that a checkpoint. With --vram a checkpoint may "
    "draft, too, on the GPU.",
)
budget = click.option(
    "--memory",
    metavar="BYTES",
    help="Of a checkpoint: bytes that its weights, cache and draft may take, such as 1GB. Layers "
    "beyond that are read from disk for every call, past the page cache.",
)
vram = click.option(
    "--vram",
    metavar="BYTES",
    help="Of a checkpoint on --device cuda: bytes of the GPU for weights, cache and calls, such as "
    "8GB. Layers beyond that stay in page-locked memory and are copied for every call. Not with "
    "--memory.",
)
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
seed = setting("--seed", 0, "Of all that is drawn at random.", click.IntRange(0, 2**63 - 1))
json_output = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
)
trust_remote_code = click.option(
    "--trust-remote-code", is_flag=True, help="Let the model's own Python code run."
)


def apply(*decorators: _Decorator, heading: str | None = None) -> _Decorator:
    """One decorator out of several, applied so that help lists them in the order given.

    Args:
        decorators: click's options, or such groups of them.
        heading: what the help of a `GroupedCommand` lists them under.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        earlier = len(getattr(function, "__click_params__", ()))
        for decorator in reversed(decorators):
            function = decorator(function)
        if heading is not None:
            for option in function.__click_params__[earlier:]:  # type: ignore[attr-defined]
                option.heading = heading
        return function

    return decorate


class GroupedCommand(click.Command):
    """A command whose help lists its options under the headings that `apply` gave them.

    Args:
        rest: heading of those that were given none, `--help` among them; it comes last.
    """

    def __init__(self, *arguments: Any, rest: str = "Options", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.rest = rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each heading, in the order of their first options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            row = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if row is not None:
                sections.setdefault(getattr(option, "heading", self.rest), []).append(row)
        rest = sections.pop(self.rest, [])
        for heading, rows in (*sections.items(), (self.rest, rest)):
            with formatter.section(heading):
                formatter.write_dl(rows)
