"""Finished layers on disk, so that an interrupted compression continues where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.artefact import require_same_settings, sha256_of_file, write_json

_PROGRESS = "progress.json"


class FinishedLayers:
    """The factors of each finished layer, in a folder, with what they were computed from.

    Args:
        folder: where the layers are kept.
        settings: everything the factors depend on; compared when a run is taken up again.

    Raises:
        InputError: the folder holds layers of a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.records: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        progress = folder / _PROGRESS
        if not progress.exists():
            self._write_progress()
            return
        earlier = json.loads(progress.read_text(encoding="utf-8"))
        require_same_settings(earlier["settings"], self.settings, folder)
        self.records = earlier["layers"]

    def __contains__(self, name: str) -> bool:
        """Whether the layer is finished and its file is whole."""
        record = self.records.get(name)
        if record is None:
            return False
        path = self.folder / record["file"]
        return path.exists() and sha256_of_file(path) == record["sha256"]

    def load(self, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Tensors and group reports of a finished layer."""
        record = self.records[name]
        tensors = load_file(self.folder / record["file"]) if record["tensors"] else {}
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
        write_json(self.folder / _PROGRESS, {"settings": self.settings, "layers": self.records})
