"""How a benchmark ends: with the exit status of `skipcat`."""

from __future__ import annotations

import sys

import click

from pipeline.errors import explain

SKIPCAT = (sys.executable, "-m", "pipeline.cli.main")


def run(command: click.Command) -> int:
    """Run; failures become the messages and exit status of `skipcat`, defects a traceback."""
    try:
        result = command.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return 2
    except Exception as error:
        aborted = isinstance(error, click.exceptions.Abort)
        failure = explain(KeyboardInterrupt() if aborted else error)
        if failure is None or failure.exit_status == 1:
            raise
        print(f"error: {failure}", file=sys.stderr)
        return failure.exit_status
    # Of a command that left by click's Exit.
    return result if isinstance(result, int) else 0
