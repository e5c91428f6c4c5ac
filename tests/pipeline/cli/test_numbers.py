"""Every number on the command line has a range, and what is outside it is a misuse, status 2."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from pipeline.cli.main import _COMMANDS, main, skipcat

CONTEXT = click.Context(skipcat, info_name="skipcat")
# Their ranges are checked, with their reasons, by what takes them.
CHECKED_LATER = {"--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty"}
CHECKED_LATER |= {"--keep-params", "--balance", "--learning-rate"}


def numbers_of(name: str) -> dict[str, click.ParamType]:
    command = skipcat.get_command(CONTEXT, name)
    assert command is not None
    return {
        max(option.opts, key=len): option.type
        for option in command.params
        if isinstance(option, click.Option)
        and isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
    }


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_number_has_a_range(name: str) -> None:
    for flag, kind in numbers_of(name).items():
        if flag in CHECKED_LATER:
            continue
        assert isinstance(kind, click.IntRange | click.FloatRange), flag
        for value in ("nan", "inf", "-inf", "1" + "0" * 40, "-1"):
            if isinstance(kind, click.FloatRange) and kind.min is None and value[-1] != "n":
                continue  # checked by what takes it, if it is a number at all
            with pytest.raises(click.BadParameter):
                kind(value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", ".", "-p", "x", "--seed", "-1"],
        ["run", ".", "-p", "x", "--threads", "99999999999"],
        ["run", ".", "-p", "x", "--temperature", "1e-320"],
        ["run", ".", "-p", "x", "--temperature", "nan"],
        ["run", ".", "-p", "x", "--temperature", "inf"],
        ["run", ".", "-p", "x", "--top-p", "nan"],
        ["run", ".", "-p", "x", "--min-p", "nan"],
        ["run", ".", "-p", "x", "--repetition-penalty", "1e-320"],
        ["run", ".", "-p", "x", "--repetition-penalty", "inf"],
        ["run", ".", "-p", "x", "--top-k", "-1"],
        ["compress", "-o", "o", "--seed", "1" + "0" * 22],
        ["compress", "-o", "o", "--keep-params", "nan"],
        ["compress", "-o", "o", "--keep-bytes", "nan"],
        ["compress", "-o", "o", "--balance", "nan"],
        ["compress", "-o", "o", "--mix", "inf"],
        ["compress", "-o", "o", "--windows", "0"],
        ["recover", ".", "-o", "o", "--text", "t", "--steps", "0"],
        ["recover", ".", "-o", "o", "--text", "t", "--steps", "1", "--learning-rate", "nan"],
        ["export", ".", "-o", "o", "--max-length", "0"],
        ["serve", ".", "--client-timeout-s", "nan"],
        ["validate", ".", "--max-kl", "nan"],
    ],
)
def test_a_number_outside_its_range_is_a_misuse(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_stdin_is_a_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["run", str(tmp_path)]) == 2
    assert "pass -p" in capsys.readouterr().err
