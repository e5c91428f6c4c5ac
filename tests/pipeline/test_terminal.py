"""What others wrote is shown at a terminal and never obeyed; a pipe gets it as it is."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.progress import result_console
from pipeline.terminal import guarded, visible

ROOT = Path(__file__).parents[2]
FOREIGN = "a\x1b]0;title\x07b\x9b31m\r\x7f[bold]m [/x]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(*arguments: str, **environment: str) -> bytes:
    """Everything that a command shows on a terminal of its own."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pipeline.cli.main", *arguments]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment}
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=settings)
    os.close(theirs)
    shown = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal
            break
        if not piece:
            break
        shown += piece
    child.wait()
    os.close(ours)
    return shown


def test_controls_are_written_out_and_layout_stays() -> None:
    assert (
        visible("a\tb\n\x1b[31m\x9b\r\x00\x7fé\u2028")
        == "a\tb\n\\x1b[31m\\x9b\\x0d\\x00\\x7fé\u2028"
    )


def test_a_pipe_gets_what_there_is() -> None:
    pipe = io.StringIO()
    guarded(pipe).write(FOREIGN)
    assert pipe.getvalue() == FOREIGN


def test_a_table_shows_markup_and_controls_as_they_are() -> None:
    from rich.table import Table

    table = Table(FOREIGN, title=FOREIGN)
    table.add_row(FOREIGN)
    terminal, pipe = Terminal(), io.StringIO()
    for file in (terminal, pipe):
        result_console(file).print(table)
        result_console(file).print(FOREIGN)
    shown = terminal.getvalue()
    assert "\x1b]" not in shown
    assert not {"\x07", "\x9b", "\x7f"} & set(shown)
    assert shown.count("[bold]m [/x]") == pipe.getvalue().count("[bold]m [/x]") == 4
    assert "\x1b]" in pipe.getvalue()


@pytest.mark.parametrize("name", ["a[/b]", "x[v2]", "[link=https://evil.example]trusted[/link]"])
def test_a_folder_may_be_called_like_markup(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(name.replace("//", "_"))
    monkeypatch.chdir(tmp_path)
    folder.mkdir(parents=True)
    record = {"request": {"model": name}, "stages": {"[red]": "[/nothing]"}}
    (folder / "build.json").write_text(json.dumps(record))
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert str(folder) in shown
    assert "[/nothing]" in shown


def test_nothing_that_a_folder_says_reaches_a_terminal_raw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("a\x1b[31mb")  # so short that no line is broken inside it
    folder.mkdir()
    (folder / "build.json").write_text(json.dumps({"request": "x\x1b]0;t\x07", "stages": {}}))
    shown = on_a_terminal("inspect", str(folder))
    assert b"\\x1b[31mb" in shown
    assert b"\x1b]0" not in shown
    assert b"\x1b[31m" not in shown
    (folder / "build.json").write_text("{")
    shown = on_a_terminal("inspect", str(folder))
    assert b"error: " in shown
    assert b"\\x1b[31mb" in shown
    assert b"\x1b" not in shown


def test_an_output_that_has_not_the_letters_gets_question_marks(
    tmp_path: Path,
) -> None:
    (tmp_path / "build.json").write_text(json.dumps({"request": "é日", "stages": {}}))
    command = [sys.executable, "-m", "pipeline.cli.main", "inspect", str(tmp_path)]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=settings, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"??" in done.stdout or b"\\u" in done.stdout
