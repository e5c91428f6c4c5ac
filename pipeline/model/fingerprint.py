"""What a model is by its content, so that another under the same name is found out."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.artefact import sha256_of_file
from pipeline.model.source import resolve_source

# Weights, configs, tokenizers and code: what a model is read from.
_READ = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")


def model_hashes(name: str) -> dict[str, str]:
    """SHA-256 of each file that a model is read from, by file name; of a hub id the commit.

    A model that was copied or touched has the same.

    Args:
        name: see `pipeline.model.source`.

    Raises:
        InputError: there is no such model.
    """
    source = resolve_source(name)
    if source.kind == "hub":
        return {"hub": name, "commit": _cached_commit(name)}
    folder = Path(source.location)
    files = [folder / source.gguf_file] if source.gguf_file else sorted(folder.iterdir())
    return {
        path.name: sha256_of_file(path)
        for path in files
        if path.is_file() and path.suffix in _READ and not path.name.startswith(".")
    }


def _cached_commit(name: str) -> str:
    """The commit of a hub model that transformers would load, or nothing where it cannot say."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    with contextlib.suppress(OSError, ValueError):
        return str(extract_commit_hash(cached_file(name, "config.json"), None))
    return ""


def file_hashes(*specs: str | None) -> dict[str, str]:
    """SHA-256 of the files that specifications of texts and plans name, by the name given.

    Args:
        specs: paths, several joined by `+`, or names that are no files, which are passed over.
    """
    parts = {part for spec in specs if spec for part in (spec, *spec.split("+"))}
    return {part: sha256_of_file(Path(part)) for part in sorted(parts) if Path(part).is_file()}
