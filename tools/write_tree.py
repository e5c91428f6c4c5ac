"""Write the annotated tree of docs/architecture.md: each source file, and what its first line says.

python tools/write_tree.py           # rewrite it
python tools/write_tree.py --check   # exit status 1 where it is not what the sources say
"""

from __future__ import annotations

import argparse
import ast
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = (
    "pipeline",
    "validate",
    "trt_plugins",
    "ort_plugins",
    "benchmarks",
    "tests/support",
    "tools",
)
BEGIN = "<!-- The tree is written by tools/write_tree.py. -->"
END = "<!-- End of the tree. -->"
COMMENTED = (".cu", ".cuh", ".h", ".cpp", ".mjs")  # sources that begin with a // comment


class TreeError(Exception):
    """A file that says nothing of itself, or a page with no place for the tree."""


def draw(root: Path, folders: tuple[str, ...] = FOLDERS) -> str:
    """The tree of some folders, a file a line, what they say in one column.

    Raises:
        TreeError: a file has no docstring, or no comment, in its first line.
    """
    rows = [row for folder in folders for row in _rows(root / folder, folder + "/", 0)]
    width = max(len(name) for name, _ in rows)
    lines = (f"{name:<{width}}  {says}".rstrip() for name, says in rows)
    return "\n".join(["```", *lines, "```"])


def _rows(folder: Path, name: str, depth: int) -> list[tuple[str, str]]:
    """(indented name, what it says) of a folder and of all that is in it."""
    package = folder / "__init__.py"
    rows = [("  " * depth + name, summary_of(package) if package.exists() else "")]
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p != package):
        if path.suffix == ".py" or path.suffix in COMMENTED:
            rows.append(("  " * (depth + 1) + path.name, summary_of(path)))
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        below = _rows(path, path.name + "/", depth + 1)
        if len(below) > 1 or (path / "__init__.py").exists():
            rows += below
    return rows


def summary_of(path: Path) -> str:
    """The first line of a module's docstring, or the first sentence that a C++ file begins with.

    Raises:
        TreeError: there is none.
    """
    text = path.read_text(encoding="utf-8")
    header = path.with_suffix(".h")
    if path.suffix == ".py":
        says = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    elif text.startswith("// "):
        comment = itertools.takewhile(lambda line: line.startswith("// "), text.splitlines())
        says = " ".join(line.removeprefix("// ") for line in comment)
        says = says.partition(". ")[0].rstrip(".:") + "."
    else:
        says = f"The body of {header.name}." if path != header and header.exists() else ""
    if not says:
        raise TreeError(f"{path}: the first line does not say what the file is")
    return says


def placed(page: str, tree: str) -> str:
    """The page with another tree between its markers.

    Raises:
        TreeError: the markers are not there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise TreeError(f"the page has no place for the tree, between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tree}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the tree, or check it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is stale")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text(encoding="utf-8")
    try:
        wanted = placed(page, draw(ROOT))
    except TreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if page == wanted:
        return 0
    if check:
        print(f"{PAGE} is stale: run python tools/write_tree.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
