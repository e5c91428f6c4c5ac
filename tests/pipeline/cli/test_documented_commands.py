"""Every command of docs/jetson.md is one that there is: its verb, its options, its choices."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from pipeline.cli.main import skipcat
from pipeline.runtime.device.__main__ import _make_parser

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/jetson.md").read_text(encoding="utf-8")
WALK = "From a flashed board to an answer: JetPack "
MOST_COMMANDS = 10
# What is not ours and on every board, or on the machine before it.
OTHERS = ("pip", "scp", "sudo", "sh", "python3", "venv/bin/pip", "venv/bin/python")
DEVICE = "skipcat-device"


def commands_of(text: str) -> list[str]:
    """The lines of a page's blocks, without what is said of them."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return [re.split(r"\s+#", line)[0] for line in lines]


def inline_commands() -> list[str]:
    """What the text and its tables name, whole enough to be run."""
    named = re.findall(r"`((?:skipcat|skipcat-device) [^`]+)`", PAGE)
    return [one for one in named if not one.endswith("...")]


def section(jetpack: str) -> str:
    return PAGE.partition(f"## {WALK}{jetpack}\n")[2].partition("\n## ")[0]


def require_ours(words: list[str]) -> None:
    """See that click knows a command, its options and what is chosen of them."""
    command = skipcat.get_command(click.Context(skipcat), words[0])
    assert command is not None, words
    known = {
        name: parameter
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-"):
            assert word in known, (words[0], word)
            kind = known[word].type
            if isinstance(kind, click.Choice):
                assert value in kind.choices, (word, value)


def require_known(line: str) -> None:
    """See that a line's program is known, and ours does what it is asked."""
    words = shlex.split(line)
    place = next((i for i, word in enumerate(words) if Path(word).name == DEVICE), None)
    if place is not None:
        verb, *rest = words[place + 1 :]
        if verb == "VERB":
            return
        of_no_folder = not rest and verb != "describe"  # the text names a verb alone
        _make_parser().parse_args([verb, "FOLDER"] if of_no_folder else [verb, *rest])
    elif words[0] == "skipcat":
        require_ours(words[1:])
    else:
        assert words[0] in OTHERS, line


@pytest.mark.parametrize("line", [*commands_of(PAGE), *inline_commands()])
def test_a_documented_command_is_one_that_there_is(line: str) -> None:
    require_known(line)


@pytest.mark.parametrize("jetpack", ["6.2", "7.2"])
def test_a_flashed_board_answers_after_ten_commands(jetpack: str) -> None:
    commands = commands_of(section(jetpack))
    assert 0 < len(commands) <= MOST_COMMANDS
    ours = [shlex.split(line) for line in commands]
    assert ours[0][:2] == ["skipcat", "compress"]
    assert ours[1][:2] == ["skipcat", "bundle"]
    assert ours[1][ours[1].index("--jetpack") + 1] == jetpack
    assert ours[-1][2] == "run"
    # Each reads what one before it wrote.
    assert ours[1][2] == ours[0][ours[0].index("-o") + 1]
    bundle = ours[1][ours[1].index("-o") + 1]
    assert all(bundle in line for line in commands if DEVICE in line or line.startswith("sh "))


def test_a_command_that_there_is_not_would_be_noticed() -> None:
    for line in (
        "skipcat fly x", "skipcat bundle x --jetpak 6.2", "skipcat bundle x --jetpack 5.1",
        "other --x",
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            require_known(line)
    with pytest.raises(Exception, match="invalid choice"):
        require_known("python3 bundle/skipcat-device fly bundle")
