"""Training: stages as data, the same bytes after any interruption, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from pipeline import training_state
from pipeline.cli.main import main
from pipeline.driving import steps
from pipeline.driving.data import _write_scenes
from pipeline.driving.recipe import STAGES, TrainRequest, places_at
from pipeline.driving.scenes.domain import DOMAINS
from pipeline.driving.scenes.scene import draw_scene
from pipeline.driving.train import train_to_folder
from pipeline.errors import InputError, UsageError
from tests.support.interrupted import broken_at

SIZE = (64, 96)
CAMVID = Path("/work/shared/data/driving/camvid")


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> TrainRequest:
    """Two sets on disk, and five steps over them: three, one and one."""
    folders = {name: tmp_path_factory.mktemp(name) for name in DOMAINS}
    for name, folder in folders.items():
        for split, first in (("train", 0), ("val", 100)):
            seeds = range(first, first + (5 if split == "train" else 2))
            scenes = ((f"{name}{seed}", draw_scene(seed, DOMAINS[name], SIZE)) for seed in seeds)
            _write_scenes(folder, split, scenes)
    return TrainRequest(
        data=str(folders["wide"]), second_data=str(folders["dense"]), steps=5, batch_size=2,
        size=SIZE, width=4, scored=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(request_: TrainRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "net"
    train_to_folder(request_, output)
    return output


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_trained_folder_is_loaded_and_says_what_it_was_trained_on(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    assert [(s["name"], s["steps"]) for s in record["stages"]] == [
        ("pretrain", 2), ("finetune", 1), ("mix", 3),
    ]  # fmt: skip
    assert [list(stage["scores"]) for stage in record["stages"]] == [["first", "second"]] * 3
    assert record["provenance"]["tool"] == "skipcat"
    model = AutoModel.from_pretrained(trained)
    pixels = AutoImageProcessor.from_pretrained(trained)([np.zeros((50, 70, 3), np.uint8)])
    assert model(**pixels).drivable.shape == (1, 1, *SIZE)
    assert not (trained / ".training").exists()


# Within the first stage, before and after its first update, and between the later ones.
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_run_that_is_interrupted_at_any_step_ends_in_the_same_bytes(
    request_: TrainRequest,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    monkeypatch.setattr(training_state, "_SECONDS_BETWEEN_SAVES", -1.0)
    output = tmp_path / "net"
    with monkeypatch.context() as patch:
        patch.setattr(steps, "drawn_batch", broken_at(at, steps.drawn_batch))
        with pytest.raises(KeyboardInterrupt):
            train_to_folder(request_, output)
    assert not output.exists()
    train_to_folder(request_, output, resume=True)
    assert weights(output) == weights(trained)


@pytest.mark.slow
def test_a_run_that_is_interrupted_at_ten_random_points_ends_in_the_same_bytes(
    request_: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times in one run: as a step is read, computed or taken, or as its state is written."""
    longer = replace(request_, steps=45)
    train_to_folder(longer, tmp_path / "whole")
    monkeypatch.setattr(training_state, "_SECONDS_BETWEEN_SAVES", -1.0)
    rng, done = np.random.default_rng(0), 0
    places = [
        (steps, "drawn_batch"), (steps, "_total_loss"), (steps, "_average_"),
        (training_state, "keep_tensors"),
    ]  # fmt: skip
    output = tmp_path / "net"
    while done < 10:
        module, name = places[rng.integers(len(places))]
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken_at(int(rng.integers(1, 5)), getattr(module, name)))
            with pytest.raises(KeyboardInterrupt):
                train_to_folder(longer, output, resume=done > 0)
        done += 1
        assert not output.exists()
    train_to_folder(longer, output, resume=True)
    assert weights(output) == weights(tmp_path / "whole")


def test_other_settings_do_not_go_on_with_a_run(
    request_: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(steps, "drawn_batch", broken_at(0, steps.drawn_batch))
        with pytest.raises(KeyboardInterrupt):
            train_to_folder(request_, tmp_path / "net")
    with pytest.raises(InputError, match="other settings"):
        train_to_folder(replace(request_, seed=1), tmp_path / "net", resume=True)


def test_training_that_diverges_says_so(
    request_: TrainRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_total_loss", lambda model, *_: infinite(model))
    with pytest.raises(InputError, match="diverged"):
        train_to_folder(replace(request_, stage="pretrain"), tmp_path / "net")


def infinite(model: torch.nn.Module) -> torch.Tensor:
    return next(model.parameters()).sum() * torch.inf


def test_a_later_stage_goes_on_with_a_trained_network(
    request_: TrainRequest, trained: Path, tmp_path: Path
) -> None:
    later = replace(request_, stage="finetune", model=trained, steps=1, width=16, size=(32, 32))
    record = train_to_folder(later, tmp_path / "net")
    assert record["settings"]["size"] == list(SIZE)  # the network's own
    assert list(record["data"]) == ["first"]
    assert weights(tmp_path / "net") != weights(trained)


def test_scenes_are_drawn_once_and_a_folder_of_ids_is_trained_on_by_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "camvid"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        codes = np.zeros(SIZE, np.uint8)
        codes[40:], codes[20:36, 30:60] = 3, 8
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(
            folder / f"images/{number}.jpg"
        )
        Image.fromarray(codes).save(folder / f"labels/{number}.png")
    arguments = ["train", "-o", str(tmp_path / "net"), "--data", f"{folder}:drivable=3,vehicle=8"]
    arguments += ["--second-data", "scenes:dense:2", "--steps", "3", "--batch-size", "2"]
    arguments += ["--size", "64", "96", "--width", "4", "--scored", "1"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "mix       second" in told
    assert "-" in told.splitlines()[1]  # no lanes are known of the first set


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"the real images are not at {CAMVID}")
def test_camvid_as_a_user_has_it_is_trained_on_by_one_command(tmp_path: Path) -> None:
    arguments = ["train", "-o", str(tmp_path / "net"), "--data", f"{CAMVID}:drivable=3,vehicle=8"]
    arguments += ["--stage", "pretrain", "--steps", "2", "--batch-size", "2", "--size", "96", "128"]
    assert main([*arguments, "--width", "4", "--scored", "4"]) == 0
    record = json.loads((tmp_path / "net/training.json").read_text())
    counts = {split: found["images"] for split, found in record["data"]["first"].items()}
    assert counts == {"train": 367, "val": 101}
    scores = record["stages"][0]["scores"]["first"]["scores"]
    assert scores["lane_iou"] is None  # no lanes are labelled
    assert scores["drivable_miou"] > 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"stage": "qat"}, UsageError), ({"steps": 0}, UsageError), ({"stage": "mix"}, UsageError),
     ({"learning_rate": float("nan")}, UsageError), ({"device": "moon"}, UsageError),
     ({"size": (60, 96)}, InputError), ({"data": "nowhere"}, InputError)],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_and_leaves_nothing(
    request_: TrainRequest, tmp_path: Path, wrong: dict, error: type[Exception]
) -> None:
    with pytest.raises(error):
        train_to_folder(replace(request_, **wrong), tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_another_model_is_no_network_to_go_on_with(
    request_: TrainRequest, trained: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="no driving network"):
        train_to_folder(replace(request_, stage="mix", model=other), tmp_path / "net")


def test_images_that_are_trained_on_are_not_scored_on(
    request_: TrainRequest, tmp_path: Path
) -> None:
    scenes = [("same", draw_scene(0, DOMAINS["wide"], SIZE))]
    for split in ("train", "val"):
        _write_scenes(tmp_path / "set", split, scenes)
    with pytest.raises(InputError, match="trained on and scored on"):
        train_to_folder(replace(request_, data=str(tmp_path / "set")), tmp_path / "net")


def test_every_image_is_read_once_before_any_is_read_again() -> None:
    counts, seen = [6, 3], [[], []]  # type: ignore[var-annotated]
    for step in range(6):
        for which, place in places_at(0, step, 2, counts):
            seen[which].append(place)
    assert sorted(seen[0]) == list(range(6))
    assert sorted(seen[1]) == sorted([0, 1, 2] * 2)


def test_rates_rise_and_fall_and_stages_share_all_steps() -> None:
    request = TrainRequest(steps=1000)
    assert sum(request.steps_of(stage) for stage in STAGES) == 1000
    for stage in STAGES:
        rates = [stage.rate_at(step, 100) for step in range(100)]
        assert max(rates) == pytest.approx(stage.rate)
        assert rates[0] < rates[4]
        assert rates[-1] < 0.05 * stage.rate
