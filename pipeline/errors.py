"""Errors a user can cause and cure: what, where, observed against expected, what to change.

Exit status: 0 ok, 1 internal, 2 usage, 3 bad or unsupported input, 4 out of memory or disk,
5 validation failed, 130 interrupted (resumable).
"""

from __future__ import annotations

import errno
import re

# Escape sequences of terminals: colours, and what else begins so.
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


class PipelineError(Exception):
    """A failure with a message for the user and an exit status for the shell.

    Args:
        what: what went wrong, one sentence.
        where: file, tensor or layer it happened in.
        observed: what was found there.
        expected: what should have been found.
        change: what the user can do about it.
    """

    exit_status = 1

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        observed: object | None = None,
        expected: object | None = None,
        change: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        details = {"where": where, "observed": observed, "expected": expected, "change": change}
        # Some libraries colour what they say, also where nobody sees it.
        self.details = {
            name: _COLOUR.sub("", str(value))
            for name, value in details.items()
            if value is not None
        }

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {name + ':':<10} {text}" for name, text in self.details.items()]
        return "\n".join(lines)


class UsageError(PipelineError):
    """A flag or argument that makes no sense."""

    exit_status = 2


class InputError(PipelineError):
    """A model, file or folder that is missing, broken or not supported."""

    exit_status = 3


class ResourceError(PipelineError):
    """Not enough memory or disk."""

    exit_status = 4


class ValidationError(PipelineError):
    """A stage of the ledger is beyond its tolerance."""

    exit_status = 5


class InterruptedRun(PipelineError):
    """Ctrl-C; what was finished is kept and `--resume` continues from it."""

    exit_status = 130


class MissingPackageError(InputError):
    """An optional package that this command needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"The package '{package}' is needed to {purpose} and is not installed.",
            change=f"make setup EXTRAS={extra}, or pip install 'skipcat[{extra}]'",
        )


def explain(error: BaseException) -> PipelineError | None:
    """The user's view of an exception; None for one that must not be caught."""
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRun(
            "Interrupted.",
            change="the same command with --resume continues a compress, a recover or a build",
        )
    if isinstance(error, MemoryError):
        return ResourceError("Out of memory.", change="use a smaller model or fewer tokens")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError("No space left on the disk.", where=error.filename)
    if isinstance(error, Exception):
        return PipelineError(
            f"Internal error: {type(error).__name__}: {error}",
            change="this is a defect of skipcat; please report it with the traceback above",
        )
    return None
