"""`skipcat <command>`: finds the command's file, and gives every failure a message and a status."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import click

from pipeline import __version__
from pipeline.errors import explain
from pipeline.machine import share_cores
from pipeline.progress import hide_progress
from pipeline.terminal import drop_stdout, guarded, safe_stdout

_COMMANDS = {
    "build": "pipeline.cli.build",
    "train": "pipeline.cli.train",
    "compress": "pipeline.cli.compress",
    "recover": "pipeline.cli.recover",
    "export": "pipeline.cli.export",
    "export-dense": "pipeline.cli.export_dense",
    "substitute": "pipeline.cli.substitute",
    "engine": "pipeline.cli.engine",
    "bundle": "pipeline.cli.bundle",
    "validate": "pipeline.cli.validate",
    "evaluate": "pipeline.cli.evaluate",
    "run": "pipeline.cli.run",
    "serve": "pipeline.cli.serve",
    "bench": "pipeline.cli.bench",
    "inspect": "pipeline.cli.inspect",
    "doctor": "pipeline.cli.doctor",
}


class _LazyGroup(click.Group):
    """A group that imports a command's file only when it is called, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(_COMMANDS[cmd_name]).command

    def make_context(self, *arguments: Any, **keywords: Any) -> click.Context:
        with _quiet_without_reader():
            return super().make_context(*arguments, **keywords)

    def invoke(self, ctx: click.Context) -> Any:
        with _quiet_without_reader():
            return super().invoke(ctx)


@contextlib.contextmanager
def _quiet_without_reader() -> Iterator[None]:
    """End without a word when whoever reads stdout is gone."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        raise click.exceptions.Exit(drop_stdout()) from None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skipcat")
@click.option("-v", "--verbose", is_flag=True, help="Show details, and tracebacks of failures.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress; notes and errors stay.")
def skipcat(verbose: bool, quiet: bool) -> None:
    """Deliver a language model, smaller and provably right, to an edge GPU."""
    hide_progress(quiet)
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        stream=guarded(sys.stderr),
        format="%(message)s",
    )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status of `pipeline.errors`."""
    share_cores()
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = "-v" in arguments or "--verbose" in arguments
    stderr = guarded(sys.stderr)
    try:
        with safe_stdout():
            result = skipcat.main(args=arguments, prog_name="skipcat", standalone_mode=False)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show(stderr)
        return 2
    except BaseException as error:
        aborted = isinstance(error, click.exceptions.Abort)
        failure = explain(KeyboardInterrupt() if aborted else error)
        if failure is None:
            raise
        if verbose or failure.exit_status == 1:
            traceback.print_exception(error, file=stderr)
        print(f"error: {failure}", file=stderr)
        return failure.exit_status
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
