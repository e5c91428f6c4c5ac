from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import click
import pytest

from pipeline import errors
from pipeline.cli import main as cli

LEAN_HELP = """
import sys
from pipeline.cli.main import main
status = main(["--help"])
heavy = {"torch", "transformers", "onnx", "onnxruntime", "numpy"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


def subclasses(cls: type[errors.PipelineError]) -> list[type[errors.PipelineError]]:
    return [cls, *(below for child in cls.__subclasses__() for below in subclasses(child))]


class SafetensorError(Exception):
    """As that of safetensors: no OSError, and no errno."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.fixture
def failing_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Run a command that raises the given exception, and return the exit status."""

    def run(failure: BaseException) -> int:
        @click.command()
        def command() -> None:
            raise failure

        monkeypatch.setattr(cli._LazyGroup, "get_command", lambda *_: command)
        return cli.main(["compress"])

    return run


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", LEAN_HELP], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr


def test_command_list_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    context = click.Context(cli.skipcat)
    assert cli.skipcat.list_commands(context) == list(cli._COMMANDS)
    assert cli.main(["--version"]) == 0
    assert "skipcat" in capsys.readouterr().out


def test_module_exits_with_the_status_of_main() -> None:
    command = [sys.executable, "-m", "pipeline.cli.main", "no-such-command"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 2
    assert "no-such-command" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_unknown_command_and_unknown_flag_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["no-such-command"]) == 2
    assert cli.main(["doctor", "--no-such-flag"]) == 2
    assert "no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("error", subclasses(errors.PipelineError), ids=lambda cls: cls.__name__)
def test_every_error_maps_to_its_exit_status(
    error: type[errors.PipelineError], failing_command: Callable[[BaseException], int]
) -> None:
    if error is errors.MissingPackageError:
        failure: errors.PipelineError = errors.MissingPackageError("datasets", "hub", "load text")
    else:
        failure = error("It failed.")
    assert failing_command(failure) == error.exit_status


def test_error_prints_every_detail_on_stderr(
    failing_command: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(
        errors.InputError("Bad.", where="layer 3", observed=5, expected=4, change="fix it")
    )
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in ("error: Bad.", "layer 3", "observed:", "expected:", "fix it"):
        assert text in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), 4),
        (OSError(errno.EDQUOT, "Quota exceeded"), 4),
        (MemoryError(), 4),
        (OSError(errno.EFBIG, "File too large"), 4),
        (OSError("13056 requested and 0 written"), 4),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), 4),
        (SafetensorError("Error while serializing: I/O error: File too big (os error 27)"), 4),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), 4),
        (RuntimeError("std::bad_alloc"), 4),
        (caused(errors.InputError("The exporter failed."), OSError(errno.ENOSPC, "full")), 4),
        (OSError(errno.EACCES, "Permission denied", "config.json"), 3),
        (FileNotFoundError(errno.ENOENT, "No such file", "text.txt"), 3),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), 3),
        (ValueError("no space left in the vocabulary"), 1),
        (PermissionError("without a path"), 1),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("an internal mistake"), 1),
        (OSError(errno.EIO, "input/output error"), 1),
    ],
)
def test_foreign_exceptions_map_to_an_exit_status(
    failure: BaseException, status: int, failing_command: Callable[[BaseException], int]
) -> None:
    assert failing_command(failure) == status


def test_a_reader_that_is_gone_ends_a_command_without_a_word() -> None:
    script = "from pipeline.cli.main import main; import sys; sys.exit(main(['--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, told = child.communicate(timeout=60)
    assert told == b""
    assert child.returncode == 141


def test_internal_error_keeps_its_traceback(
    failing_command: Callable[[BaseException], int], capsys: pytest.CaptureFixture[str]
) -> None:
    failing_command(ZeroDivisionError("an internal mistake"))
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert "an internal mistake" in captured
