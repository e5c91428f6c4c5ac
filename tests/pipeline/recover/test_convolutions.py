"""`skipcat recover` of rounded convolutions: trained under rounding, towards the teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline import training_state
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.modeling_quantized import Int8Conv
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.driving.network import QyolopConfig, QyolopForDrivingPerception
from pipeline.driving.preprocess import QyolopImageProcessor
from pipeline.errors import InputError, UsageError
from pipeline.recover import convolutions
from pipeline.recover.recover import recover_to_folder
from pipeline.recover.request import RecoverRequest
from tests.support.interrupted import broken_at

SIZE = (32, 64)
SCENES = "scenes:wide:10"


def network(folder: Path, width: int = 2) -> Path:
    torch.manual_seed(0)
    model = QyolopForDrivingPerception(QyolopConfig(SIZE, width))
    with torch.no_grad():
        for _ in range(8):
            model(torch.rand(4, 3, *SIZE))
    model.eval().save_pretrained(folder)
    QyolopImageProcessor.for_size(SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("recover")
    teacher = network(root / "teacher")
    request = CompressRequest(
        str(teacher), method="int8-min-max", runtime="tensorrt", calibration=SCENES, windows=4
    )
    compress_to_folder(request, root / "int8")
    return teacher, root / "int8"


def asked(folders: tuple[Path, Path], **changes: object) -> RecoverRequest:
    settings = {
        "teacher": str(folders[0]), "steps": 6, "batch_size": 2, "learning_rate": 2e-5,
    } | changes  # fmt: skip
    text = "" if "data" in changes else SCENES
    return RecoverRequest(folders[1], text, **settings)  # type: ignore[arg-type]


def test_the_error_falls_at_the_same_size(folders: tuple[Path, Path], tmp_path: Path) -> None:
    recovery = recover_to_folder(asked(folders), tmp_path / "out")
    loss = recovery["loss"]["output_error"]
    assert 0 < loss["after"] < loss["before"]
    before, after = load_checkpoint(folders[1]), load_checkpoint(tmp_path / "out")
    assert {n: t.shape for n, t in before.state_dict().items()} == {
        n: t.shape for n, t in after.state_dict().items()
    }
    assert sum(isinstance(module, Int8Conv) for module in after.modules()) == 65
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["recovery"]["images"]["images"] == 10
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "6 steps of 2 images of scenes:wide:10, by distillation" in card
    again = recover_to_folder(asked(folders), tmp_path / "again")
    assert again["loss"] == recovery["loss"]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_labels_are_trained_on_with_a_teacher_and_without(
    folders: tuple[Path, Path], tmp_path: Path, with_teacher: bool
) -> None:
    teacher = str(folders[0]) if with_teacher else None
    recovery = recover_to_folder(
        asked(folders, data=SCENES, teacher=teacher, learning_rate=1e-3), tmp_path / "out"
    )
    loss = recovery["loss"]["label_loss"]
    assert 0 < loss["after"] < loss["before"]
    assert recovery["objective"] == "labels" + " and distillation" * with_teacher
    assert recovery["images"]["images"] == 10
    assert sum(isinstance(m, Int8Conv) for m in load_checkpoint(tmp_path / "out").modules()) == 65


def test_a_run_that_is_interrupted_ends_in_the_same_bytes(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_state, "_SECONDS_BETWEEN_SAVES", -1.0)
    request = asked(folders, steps=4)
    recover_to_folder(request, tmp_path / "whole")
    with monkeypatch.context() as patch:
        # One call measures what is held out, two are of steps.
        broken = broken_at(3, convolutions.output_error)
        patch.setattr(convolutions, "output_error", broken)
        with pytest.raises(KeyboardInterrupt):
            recover_to_folder(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="other settings"):
        recover_to_folder(replace(request, seed=1), tmp_path / "out", resume=True)
    recover_to_folder(request, tmp_path / "out", resume=True)
    whole, resumed = (tmp_path / n / "model.safetensors" for n in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_a_teacher_is_needed_and_it_must_be_the_same_network(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="towards the network"):
        recover_to_folder(asked(folders, teacher=None), tmp_path / "out")
    with pytest.raises(UsageError, match="sums are exact"):
        recover_to_folder(asked(folders, bfloat16=True), tmp_path / "out")
    with pytest.raises(UsageError, match="one thing to train on"):
        recover_to_folder(replace(asked(folders), data=SCENES), tmp_path / "out")
    other = network(tmp_path / "other", width=4)
    with pytest.raises(InputError, match="other convolutions"):
        recover_to_folder(asked(folders, teacher=str(other)), tmp_path / "out")
    with pytest.raises(InputError, match="too few images"):
        recover_to_folder(asked(folders, batch_size=10), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").exists()
