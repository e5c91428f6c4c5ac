"""Errors a user can cause and cure: what, where, observed against expected, what to change.

Exit status: 0 ok, 1 internal, 2 usage, 3 bad or unsupported input, 4 out of memory or disk,
5 validation failed, 130 interrupted (resumable).
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

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
        # Some libraries colour what they say, also where nobody sees it.
        seen = None if observed is None else _COLOUR.sub("", str(observed))
        details = {"where": where, "observed": seen, "expected": expected, "change": change}
        self.details = {name: str(value) for name, value in details.items() if value is not None}

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


class _InterruptedRun(PipelineError):
    """Ctrl-C; what was finished is kept and `--resume` continues from it."""

    exit_status = 130


class MissingPackageError(InputError):
    """An optional package that this command needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"The package '{package}' is needed to {purpose} and is not installed.",
            change=f"make setup EXTRAS={extra}, or pip install 'skipcat[{extra}]'",
        )


# Libraries tell of a full disk or memory in words of their own: safetensors, numpy's tofile,
# torch's zip writer, h5py, protobuf; torch, ONNX Runtime, C++.
_FULL_DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_DISK_WORDS = re.compile(
    r"no space left|quota exceeded|file too large|\b(?:os error|errno)[ =]*(?:27|28|122)\b"
    r"|\d+ requested and \d+ written|PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+"
    r"|basic_ios::clear|error writing (?:file|data|to file)|failed to (?:write|serialize) .*proto",
    re.IGNORECASE,
)
_FULL_MEMORY_WORDS = re.compile(
    r"(?:can't|cannot|unable to|failed to|could not) allocate|bad[_ ]alloc|out of memory"
    r"|memory allocation .*failed|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)
# Of a path, and so of whoever gave it.
_PATH_NUMBERS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOTEMPTY, errno.EBUSY, errno.ELOOP, errno.ENAMETOOLONG,
)  # fmt: skip
# Python's own errors about values quote what they are about, whatever that says.
_ABOUT_VALUES = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


def shortage_of(error: BaseException | None, where: object | None = None) -> ResourceError | None:
    """What an exception, or what it was raised from, says of a full disk or memory.

    Args:
        error: the exception.
        where: the folder written to, for an exception that names no file.

    Returns:
        The user's view of it; None if it tells of neither.
    """
    while error is not None:
        if isinstance(error, ResourceError):
            return error
        said = first_line(error) if str(error).strip() else None
        if _tells(error, _FULL_DISK_NUMBERS, _FULL_DISK_WORDS):
            return ResourceError(
                "No space left on the disk, or for a file of this size.",
                where=where or getattr(error, "filename", None),
                observed=said,
                change="free some space or raise the limit, or write to another disk",
            )
        if isinstance(error, MemoryError) or _tells(error, (errno.ENOMEM,), _FULL_MEMORY_WORDS):
            return ResourceError(
                "Out of memory.",
                observed=said,
                change="use a smaller model, fewer tokens or a smaller --max-length",
            )
        error = error.__cause__
    return None


def _tells(error: BaseException, numbers: tuple[int, ...], words: re.Pattern[str]) -> bool:
    if isinstance(error, (PipelineError, *_ABOUT_VALUES)):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in numbers
    return isinstance(error, Exception) and words.search(str(error)) is not None


def is_panic(error: BaseException) -> bool:
    """Whether it is how libraries in Rust fail where they did not foresee it: no Exception."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """What a library says, or the kind of its error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def path_of(error: BaseException) -> Path | None:
    """The path that an exception says is missing, in the way or not ours to use; None of others."""
    if not isinstance(error, OSError) or error.errno not in _PATH_NUMBERS:
        return None
    return Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None


def explain(error: BaseException) -> PipelineError | None:
    """The user's view of an exception; None for one that must not be caught."""
    shortage = shortage_of(error)
    if shortage is not None:
        return shortage
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return _InterruptedRun(
            "Interrupted.",
            change="the same command with --resume continues a compress, a recover or a build",
        )
    path = path_of(error)
    if path is not None:
        return InputError(
            "A file or folder cannot be used.",
            where=path,
            observed=getattr(error, "strerror", None),
            change="check that it is there, and its permissions",
        )
    if isinstance(error, Exception):
        return PipelineError(
            f"Internal error: {type(error).__name__}: {error}",
            change="this is a defect of skipcat; please report it with the traceback above",
        )
    return None
