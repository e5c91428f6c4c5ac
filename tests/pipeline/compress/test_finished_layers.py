"""Records of finished layers: damaged ones are refused, and say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.compress.finished_layers import FinishedLayers
from pipeline.errors import InputError

SETTINGS = {"seed": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layers = FinishedLayers(tmp_path / "layers", SETTINGS)
    layers.add("layer.0", {"a": torch.zeros(3)}, [{"members": ["a"]}])
    return layers.folder


def test_layers_are_taken_up_again(folder: Path) -> None:
    again = FinishedLayers(folder, SETTINGS)
    assert "layer.0" in again
    assert again.load("layer.0")[1] == [{"members": ["a"]}]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {"seed": 0}}', "[" * 10**5])
def test_a_damaged_progress_file_is_refused(folder: Path, content: str) -> None:
    (folder / "progress.json").write_text(content)
    with pytest.raises(InputError):
        FinishedLayers(folder, SETTINGS)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../x"},
        {"file": 5},
        {"sha256": None},
        {"tensors": "1"},
        {"groups": [5]},
        {"groups": {}},
    ],
)
def test_a_damaged_record_is_refused(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "progress.json"
    progress = json.loads(path.read_text())
    progress["values"]["layers"]["layer.0"] |= change
    path.write_text(json.dumps(progress))
    with pytest.raises(InputError):
        FinishedLayers(folder, SETTINGS)


def test_a_record_of_other_tensors_is_refused(folder: Path) -> None:
    layers = FinishedLayers(folder, SETTINGS)
    layers.records["layer.0"]["tensors"] = 0
    with pytest.raises(InputError, match="without --resume"):
        layers.load("layer.0")


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "layers").write_text("")
    with pytest.raises(InputError, match="in the way"):
        FinishedLayers(tmp_path / "layers", SETTINGS)
