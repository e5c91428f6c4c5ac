"""`skipcat-device` as one file: the modules that it needs, found by their imports, in a zip."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("pipeline", "trt_plugins")
_ENTRY = "pipeline.runtime.device"
# Run by their path or name, in processes of their own.
_BESIDE = ("pipeline.runtime.template_process", "pipeline.engine.worker")
_MAIN = "import sys\nfrom pipeline.runtime.device.__main__ import main\n\nsys.exit(main())\n"
_SHEBANG = b"#!/usr/bin/env python3\n"
_NO_DATE = (1980, 1, 1, 0, 0, 0)  # the same program gives the same bytes


def write_program(path: Path) -> None:
    """Write the program, which python3 runs as it is; the same bytes for the same sources."""
    with path.open("wb") as file:
        file.write(_SHEBANG)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, "__main__.py", _MAIN)
            for source in sorted(_sources()):
                name = source.relative_to(_ROOT).as_posix()
                _add(archive, name, source.read_text(encoding="utf-8"))
    path.chmod(0o755)


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    entry = zipfile.ZipInfo(name, _NO_DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, text)


def _sources() -> set[Path]:
    """Files of the program: its own package, and what that needs."""
    own = sorted((_ROOT / _ENTRY.replace(".", "/")).glob("*.py"))
    return sources_of([*own, *filter(None, map(_file_of, _BESIDE))])


def sources_of(own: Sequence[Path]) -> set[Path]:
    """Files of this checkout and what they import at any time, that again at once, and packages."""
    waiting, found = [*own], set[Path]()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        folders = [folder for folder in path.parents if _ROOT in folder.parents]
        around = (folder / "__init__.py" for folder in folders)
        waiting += [file for file in around if file.is_file()]
        names = _imports(path, everywhere=path in own)
        waiting += [file for file in map(_file_of, names) if file is not None]
    return found


def _imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Modules that a file imports: at once, or also within its functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _file_of(name: str) -> Path | None:
    """The file of one of our modules; None for anything else."""
    if not name.startswith(_PACKAGES):
        return None
    path = _ROOT.joinpath(*name.split("."))
    files = (path / "__init__.py", path.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)
