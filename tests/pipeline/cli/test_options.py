"""Every option says what it does, and the help of the long commands has headings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import click
import pytest
import torch

from pipeline.cli.main import _COMMANDS, skipcat
from pipeline.cli.options import own_threads, what_next
from pipeline.machine import product_threads

CONTEXT = click.Context(skipcat, info_name="skipcat")


def command_of(name: str) -> click.Command:
    command = skipcat.get_command(CONTEXT, name)
    assert command is not None
    return command


def options_of(command: click.Command) -> dict[str, click.Option]:
    """Longest spelling -> option."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    return {max(option.opts, key=len): option for option in options}


def sections_of(command: click.Command) -> dict[str, list[str]]:
    """Heading -> the options under it, out of the help as it is printed."""
    text = command.get_help(click.Context(command, CONTEXT, info_name=command.name))
    sections: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z][A-Za-z, ]*:", line):
            heading = line[:-1]
        elif line.startswith("  -"):
            found = re.search(r"--[a-z][a-z-]*", line)
            assert found
            sections.setdefault(heading, []).append(found.group())
    return sections


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_option_of_every_command_has_a_help_text(name: str) -> None:
    mute = [
        spelling for spelling, option in options_of(command_of(name)).items() if not option.help
    ]
    assert not mute


def test_each_option_of_compress_stands_in_one_group() -> None:
    command = command_of("compress")
    sections = sections_of(command)
    headings = [
        "Budget",
        "Method",
        "Calibration",
        "Quantisation",
        "KV cache",
        "Model, output and run",
    ]
    assert list(sections) == headings
    listed = [option for options in sections.values() for option in options]
    assert sorted(listed) == sorted([*options_of(command), "--help"])


@pytest.mark.parametrize(
    ("name", "last"),
    [("build", "Model, output and run"), ("run", "Options"), ("serve", "Options")],
)
def test_the_options_of_a_grouped_command_are_all_listed_and_the_rest_comes_last(
    name: str, last: str
) -> None:
    command = command_of(name)
    sections = sections_of(command)
    assert list(sections)[-1] == last
    assert len(sections) > 1
    listed = [option for options in sections.values() for option in options]
    assert sorted(listed) == sorted([*options_of(command), "--help"])


@pytest.mark.parametrize(
    ("option", "excluded"),
    [
        ("--memory", ["--keep-bytes", "--weights"]),
        ("--keep-bytes", ["--memory", "--weights"]),
        ("--weights", ["--memory", "--keep-bytes"]),
        ("--mix", ["--one-shot"]),
        ("--one-shot", ["--mix"]),
    ],
)
def test_an_option_that_excludes_others_says_so(option: str, excluded: list[str]) -> None:
    text = options_of(command_of("compress"))[option].help or ""
    sentence = text[text.index("Excludes ") :].partition(".")[0]
    assert all(other in sentence for other in excluded)


def test_what_is_next_is_said_as_the_user_can_type_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/skipcat").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert what_next("a b", "c") == "next: .venv/bin/skipcat a b   or   .venv/bin/skipcat c"
    monkeypatch.setenv("PATH", str(tmp_path / ".venv/bin"))
    assert what_next("a b") == "next: skipcat a b"


COMPUTING = [
    name for name in _COMMANDS if name not in ("engine", "inspect", "doctor")
]  # TensorRT has threads of its own; the others compute nothing


@pytest.mark.parametrize("name", COMPUTING)
def test_every_command_that_computes_takes_threads(name: str) -> None:
    assert "--threads" in options_of(command_of(name))


def test_threads_are_what_computes_while_the_command_runs_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen: list[tuple[int, int, str]] = []

    @click.command()
    @own_threads
    def look() -> None:
        seen.append((torch.get_num_threads(), product_threads(), os.environ["OMP_NUM_THREADS"]))

    before = torch.get_num_threads(), product_threads()
    look.main(["--threads", "3"], standalone_mode=False)
    look.main([], standalone_mode=False)
    assert seen == [(3, 3, "3"), (*before, "1")]
    assert (torch.get_num_threads(), product_threads()) == before
