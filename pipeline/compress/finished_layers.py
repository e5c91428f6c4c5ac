"""Finished layers on disk, so that an interrupted compression continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.artefact import damaged, require_same_settings, sha256_of_file, write_json
from pipeline.errors import InputError

_PROGRESS = "progress.json"
AFRESH = "start afresh without --resume"


class FinishedLayers:
    """The factors of each finished layer, in a folder, with what they were computed from.

    Args:
        folder: where the layers are kept.
        settings: everything the factors depend on; compared when a run is taken up again.

    Raises:
        InputError: the folder holds layers of a run with other settings, or its record is damaged.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.records: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError("A file is in the way.", where=folder, change=AFRESH) from error
        progress = folder / _PROGRESS
        if not progress.exists():
            self._write_progress()
            return
        earlier = kept_values(progress)
        if earlier is None:
            raise damaged(progress, "not what was written")
        require_same_settings(earlier["settings"], self.settings, folder)
        self.records = earlier["layers"]

    def __contains__(self, name: str) -> bool:
        """Whether the layer is finished and its file is whole."""
        record = self.records.get(name)
        if record is None:
            return False
        path = self.folder / record["file"]
        return path.is_file() and sha256_of_file(path) == record["sha256"]

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Tensors and group reports of a finished layer.

        Raises:
            InputError: the file does not hold what its record says.
        """
        record = self.records[name]
        path = self.folder / record["file"]
        tensors = load_file(path)
        if len(tensors) != record["tensors"]:
            raise InputError(
                "A finished layer is not what its record says.",
                where=path,
                observed=f"{len(tensors)} tensors",
                expected=record["tensors"],
                change=AFRESH,
            )
        return tensors, record["groups"]

    def add(
        self, name: str, tensors: dict[str, torch.Tensor], groups: list[dict[str, Any]]
    ) -> None:
        """Keep a layer: its file first, then the record that says it is whole."""
        file = f"{name}.safetensors"
        path = self.folder / file
        aside = path.with_suffix(".writing")
        save_file(tensors, aside)
        aside.replace(path)
        self.records[name] = {
            "file": file,
            "sha256": sha256_of_file(path),
            "tensors": len(tensors),
            "groups": groups,
        }
        self._write_progress()

    def _write_progress(self) -> None:
        keep_values(self.folder / _PROGRESS, {"settings": self.settings, "layers": self.records})


def keep_values(path: Path, values: Any) -> None:
    """Write values as JSON with their hash, for a run that is taken up again."""
    write_json(path, {"sha256": _digest(values), "values": values})


def kept_values(path: Path) -> Any:
    """The values as they were kept; None where the file is missing or another."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        values = kept["values"]
        return values if kept["sha256"] == _digest(values) else None
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
