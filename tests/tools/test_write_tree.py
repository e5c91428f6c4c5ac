"""The annotated tree names every file once, with what the file says of itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> ModuleType:
    """One file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_tree = load("write_tree")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    package = tmp_path / "house" / "room"
    package.mkdir(parents=True)
    (tmp_path / "house" / "__init__.py").write_text('"""A house."""\n')
    (package / "__init__.py").write_text('"""A room."""\n')
    (package / "chair.py").write_text('"""To sit on.\n\nAnd more."""\n')
    (package / "lamp.h").write_text("// Light, of\n// a lamp. And more.\n//\n// Even more.\n")
    (package / "lamp.cpp").write_text('#include "lamp.h"\n')
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "chair.pyc").write_bytes(b"")
    return tmp_path


def test_each_file_is_a_line_with_the_first_line_it_has(sources: Path) -> None:
    assert write_tree.draw(sources, ("house",)).splitlines() == [
        "```",
        "house/        A house.",
        "  room/       A room.",
        "    chair.py  To sit on.",
        "    lamp.cpp  The body of lamp.h.",
        "    lamp.h    Light, of a lamp.",
        "```",
    ]


@pytest.mark.parametrize(("name", "text"), [("mute.py", "x = 1\n"), ("mute.cpp", "int x;\n")])
def test_a_file_that_says_nothing_is_named(sources: Path, name: str, text: str) -> None:
    (sources / "house" / name).write_text(text)
    with pytest.raises(write_tree.TreeError, match=name):
        write_tree.draw(sources, ("house",))


def test_only_what_is_between_the_markers_is_replaced() -> None:
    page = f"before\n{write_tree.BEGIN}\nold\n{write_tree.END}\nafter\n"
    new = f"before\n{write_tree.BEGIN}\nnew\n{write_tree.END}\nafter\n"
    assert write_tree.placed(page, "new") == new
    assert write_tree.placed(new, "new") == new
    with pytest.raises(write_tree.TreeError, match="no place"):
        write_tree.placed("before\nafter\n", "new")


def test_a_stale_page_fails_the_check_until_it_is_written(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = sources / "page.md"
    page.write_text(f"{write_tree.BEGIN}\n{write_tree.END}\n")
    monkeypatch.setattr(write_tree, "PAGE", page)
    monkeypatch.setattr(write_tree, "ROOT", sources)
    monkeypatch.setattr(write_tree.draw, "__defaults__", (("house",),))
    assert write_tree.main(["--check"]) == 1
    assert "chair" not in page.read_text()
    assert write_tree.main([]) == 0
    assert "chair.py  To sit on." in page.read_text()
    assert write_tree.main(["--check"]) == 0
