"""The figures of the documentation are those of the results, and one that is not is found."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import RESULTS
from benchmarks.documentation import write
from benchmarks.documentation.markdown import Figure, only_row, table
from benchmarks.documentation.write import FIGURES, pages, rewritten, text_of
from pipeline.errors import InputError

TABLE = "<!-- figures: toy -->\n| | n |\n| --- | ---: |\n| one | 1 |\n| two | 2 |\n<!-- end -->\n"
INLINE = "It is <!-- figures: toy/number -->2.5<!-- end --> times as fast.\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one page, one file of results and two figures."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "README.md").write_text("Nothing measured.\n")
    (tmp_path / "benchmarks" / "results" / "toy.json").write_text('{"one": 1, "two": 2}')
    (tmp_path / "README.md").write_text(f"# Title\n\n{TABLE}\n{INLINE}")
    monkeypatch.setattr(write, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(write, "_ROOT", tmp_path)
    figures = {
        "toy": Figure(
            ("toy",), lambda found: table(("", "n"), [[k, str(n)] for k, n in found.items()])
        ),
        "toy/number": Figure(("toy",), lambda found: [f"{found['two'] + 0.5}"]),
    }
    monkeypatch.setattr(write, "FIGURES", figures)
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    answer = CliRunner().invoke(write.command, arguments, standalone_mode=False)
    status = answer.return_value if answer.exception is None else 1
    return status or 0, answer.output


def test_the_documentation_has_the_figures_of_the_results() -> None:
    assert [difference for page in pages() for difference in rewritten(page)[1]] == []


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_made_and_stands_somewhere(name: str) -> None:
    lines = text_of(name).splitlines()
    assert lines
    assert all(line.strip() for line in lines)
    columns = {line.count("|") for line in lines}
    assert len(columns) == 1, "rows of different length"
    text = "".join(page.read_text(encoding="utf-8") for page in pages())
    assert f"<!-- figures: {name} -->" in text


def test_every_result_is_shown_or_linked() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in pages())
    for path in RESULTS.glob("*.json"):
        assert f"results/{path.name}" in text, path.name


def test_writing_changes_nothing_where_nothing_differs(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    assert run("--check") == (0, "all figures are as the results have them\n")
    assert run() == (0, "all figures are as the results have them\n")
    assert (folder / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("| two | 2 |", "| two | 3 |", 7),
        ("| one | 1 |\n", "", 6),
        ("| two | 2 |\n", "| two | 2 |\n| three | 3 |\n", 8),
        ("-->2.5<!--", "-->2.6<!--", 10),
    ],
)
def test_a_changed_figure_is_found_with_its_line_and_mended(
    folder: Path, old: str, new: str, line: int
) -> None:
    page = folder / "README.md"
    before = page.read_text()
    assert old in before
    page.write_text(before.replace(old, new))
    status, output = run("--check")
    assert status == 1
    assert f"README.md:{line}: toy" in output
    assert page.read_text() == before.replace(old, new), "--check writes nothing"
    run()
    assert page.read_text() == before


def test_a_changed_result_changes_the_page(folder: Path) -> None:
    results = folder / "benchmarks" / "results" / "toy.json"
    results.write_text(json.dumps({"one": 1, "two": 7}))
    assert run("--check")[0] == 1
    run()
    text = (folder / "README.md").read_text()
    assert "| two | 7 |" in text
    assert "-->7.5<!-- end --> times" in text


def test_marks_that_do_not_fit_are_refused(folder: Path) -> None:
    page = folder / "docs" / "page.md"
    for text in ("<!-- figures: toy -->\n", f"<!-- figures: toy -->\n{TABLE}"):
        page.write_text(text)
        with pytest.raises(InputError, match="no end") as refused:
            rewritten(page)
        assert refused.value.details["where"] == f"{page}:1"
    page.write_text("<!-- figures: nonsense --><!-- end -->")
    with pytest.raises(InputError, match="no such figure"):
        rewritten(page)


def test_figures_are_listed_with_their_results(folder: Path) -> None:
    assert run("--list") == (0, "toy: toy.json\ntoy/number: toy.json\n")


def test_a_row_is_the_only_one() -> None:
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 2}]
    assert only_row(rows, a=1, b=2) is rows[1]
    for wanted in ({"a": 1}, {"a": 3}):
        with pytest.raises(LookupError):
            only_row(rows, **wanted)


def test_the_command_is_one_of_click() -> None:
    assert isinstance(write.command, click.Command)
