"""What produced an artefact: library versions, the commit of this tool, the machine."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

from pipeline import __version__

_LIBRARIES = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "polygraphy",
)

# A folder's name, as far as it can be told from the words around it.
_NAME = r"[^\s/'\"<>|]+"


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide the numbers, by distribution name."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def sources_sha256() -> str:
    """Hex SHA-256 of this package's Python files and their names, as they lie on the disk."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from, with '-dirty' if it has changes; else None."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def public_name(spec: object) -> str:
    """What a record that travels says of something that was read: of a path its last part alone.

    Args:
        spec: a path, several joined by `+`, or a name that is none, which stays as it is.
    """
    text = str(spec)
    path, parts = Path(text).expanduser(), text.split("+")
    if len(parts) > 1 and not path.exists():
        return "+".join(map(public_name, parts))
    if path.exists() or path.is_absolute() or text.startswith("."):
        return path.name or path.resolve().name
    return text


def public_text(text: str) -> str:
    """What a record that travels says in words: of every path in them the last part alone.

    Args:
        text: such as the message of an error.
    """
    known = []
    for find in (Path.cwd, Path.home):  # their names may have blanks in them
        with contextlib.suppress(RuntimeError, OSError):  # there is none
            known.append(re.escape(str(find()).rstrip("/")))
    known = sorted(filter(None, known), key=len, reverse=True)  # one may lie in the other
    begin = "|".join([*known, f"(?P<top>/{_NAME})"])
    folders = re.compile(rf"(?<![\w/.])(?:file://)?(?:{begin})/(?:{_NAME}/)*(?=[^\s/])")
    return folders.sub(_without_folders, text)


def _without_folders(found: re.Match[str]) -> str:
    """Nothing in the place of a path's folders; names of a graph's nodes may look like some."""
    top = found["top"]
    return "" if top is None or Path(top).is_dir() else found[0]


def provenance() -> dict[str, object]:
    """The record written beside every artefact."""
    return {
        "tool": "skipcat",
        "version": __version__,
        "commit": _git_commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": library_versions(),
    }
