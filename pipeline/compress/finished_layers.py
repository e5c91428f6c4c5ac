"""Finished layers on disk, so that an interrupted compression continues where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.artefact import require_same_settings, sha256_of_file, write_json
from pipeline.errors import InputError
from pipeline.json_file import json_field, read_json_object

_PROGRESS = "progress.json"
AFRESH = "start afresh without --resume"
_RECORD_FIELDS = {"file": str, "sha256": str, "tensors": int, "groups": list}


class FinishedLayers:
    """The factors of each finished layer, in a folder, with what they were computed from.

    Args:
        folder: where the layers are kept.
        settings: everything the factors depend on; compared when a run is taken up again.

    Raises:
        InputError: the folder holds layers of a run with other settings, or its record is broken.
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
        earlier = read_json_object(progress, change=AFRESH)
        settings = json_field(earlier, "settings", dict, progress)
        require_same_settings(settings, self.settings, folder)
        self.records = _records(earlier, progress)

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
        write_json(self.folder / _PROGRESS, {"settings": self.settings, "layers": self.records})


def _records(earlier: dict[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """The records of finished layers, each with what `add` wrote.

    Raises:
        InputError: one is broken, or names a file that lies elsewhere.
    """
    layers: dict[str, Any] = json_field(earlier, "layers", dict, path)
    for name in layers:
        where = f"{path}: {name}"
        record: dict[str, Any] = json_field(layers, name, dict, where)
        for field, kind in _RECORD_FIELDS.items():
            json_field(record, field, kind, where)
        groups = [group for group in record["groups"] if isinstance(group, dict)]
        members = [json_field(group, "members", list, where) for group in groups]
        if record["file"] != f"{name}.safetensors" or len(members) != len(record["groups"]):
            raise InputError(
                "The record of a finished layer is broken.", where=where, change=AFRESH
            )
    return layers
