"""Every benchmark is a module that imports, says what it takes, and stands on the product alone."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(FOLDER)], "benchmarks.")
    if not module.ispkg
)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_and_its_command_has_help(name: str) -> None:
    command = getattr(importlib.import_module(name), "command", None)
    if isinstance(command, click.Command):
        answer = CliRunner().invoke(command, ["--help"])
        assert answer.exit_code == 0, answer.output
        assert "Usage" in answer.output


def test_a_missing_argument_is_a_usage_error() -> None:
    generation = importlib.import_module("benchmarks.cpu.generation")
    answer = CliRunner().invoke(generation.command, [])
    assert answer.exit_code == 2
    assert "--ours" in answer.output


def imported_modules(path: Path) -> set[str]:
    """Names of the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_needs_neither_the_tests_nor_the_command_line(path: Path) -> None:
    forbidden = ("tests", "pipeline.cli")
    reached = [name for name in imported_modules(path) if name.startswith(forbidden)]
    assert reached == []
    text = path.read_text(encoding="utf-8")
    assert "sys.path.insert" not in text
    assert "../" not in text


def test_results_have_one_folder() -> None:
    assert sorted(path.name for path in FOLDER.rglob("*.json")) == sorted(
        path.name for path in benchmarks.RESULTS.glob("*.json")
    )
