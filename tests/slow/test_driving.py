"""What `make driving` does, on small scenes and in few steps: some minutes of one core."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from pipeline.cli.main import main
from tools.draw_scenes import main as draw_main

pytestmark = pytest.mark.slow
SIZE = ("96", "160")


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of both domains, and a network that was trained on them."""
    folder = tmp_path_factory.mktemp("driving")
    drawn = ["-o", str(folder / "scenes"), "--scenes", "120", "--validated", "24"]
    assert draw_main([*drawn, "--size", *SIZE]) == 0
    run(
        "train", "-o", folder / "net", "--data", folder / "scenes/wide", "--resume",
        "--second-data", folder / "scenes/dense", "--steps", 160, "--size", *SIZE, "--width", 8,
        "--scored", 24,
    )  # fmt: skip
    return folder


def test_a_short_training_finds_the_road_in_scenes_that_it_has_not_seen(made: Path) -> None:
    stages = json.loads((made / "net/training.json").read_text())["stages"]
    first, last = (stages[place]["scores"] for place in (0, -1))
    for name in ("first", "second"):
        # No drivable pixel at all is 0.36; 0.66 and 0.71 were reached where this was written.
        road = "drivable_miou"
        assert last[name]["scores"][road] > max(0.5, first[name]["scores"][road] + 0.1)
        # Vehicles take longer: after so few steps a score of 24 images says that some are found.
        assert last[name]["scores"]["ap50"] > 0.005


def test_every_stage_scores_as_the_network_does_and_a_picture_is_drawn(made: Path) -> None:
    run("export", made / "net", "-o", made / "onnx")
    run("export", made / "net", "-o", made / "onnx-fp16", "--dtype", "float16")
    stages = ["--onnx", made / "onnx", "--onnx", made / "onnx-fp16"]
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        run("engine", made / "onnx-fp16", "-o", made / "engine", "--target", "sm86")
        stages += ["--engine", made / "engine"]
    run(
        "validate", "--original", made / "net", *stages, "--data", made / "scenes/wide",
        "-o", made / "ledger",
    )  # fmt: skip
    rows = json.loads((made / "ledger/ledger.json").read_text())["rows"]
    trained = json.loads((made / "net/training.json").read_text())["stages"][-1]["scores"]["first"]
    assert rows[0]["driving"]["scores"] == pytest.approx(trained["scores"], abs=1e-6)
    for row in rows[1:5]:
        assert row["verdict"]["status"] == "pass"
        alike = row["driving"]["to_original"]
        assert min(alike["boxes_f"], alike["drivable_iou"]) > 0.95
    run("run", made / "onnx", "--image", made / "scenes/wide/images/100k/val", "-o", made / "seen")
    assert len(list((made / "seen/drawn").glob("*.jpg"))) == 24


def test_eight_bits_are_proven_from_the_training_to_the_engine(made: Path) -> None:
    wide = made / "scenes/wide"
    run("compress", "-m", made / "net", "-o", made / "int8", "--method", "int8",
        "--runtime", "tensorrt", "--calibration", wide, "--windows", 24)  # fmt: skip
    run("recover", made / "int8", "-o", made / "trained", "--data", wide, "--teacher",
        made / "net", "--steps", 10, "--batch-size", 8)  # fmt: skip
    run("export", made / "trained", "-o", made / "onnx-int8", "--dtype", "float32")
    assert json.loads((made / "onnx-int8/export.json").read_text())["proof"]["relative_error"] == 0
    stages = ["--beside", made / "int8", "--checkpoint", made / "trained"]
    stages += ["--onnx", made / "onnx-int8"]
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        run("engine", made / "onnx-int8", "-o", made / "engine-int8", "--target", "sm86")
        manifest = json.loads((made / "engine-int8/manifest.json").read_text())
        assert manifest["int8"] == {"convolutions": 65, "int8": 65, "float": []}
        stages += ["--engine", made / "engine-int8"]
    run("validate", "--original", made / "net", *stages, "--data", wide,
        "-o", made / "ledger-int8")  # fmt: skip
    rows = json.loads((made / "ledger-int8/ledger.json").read_text())["rows"]
    assert [row["verdict"]["status"] for row in rows[:5]] == [
        "measured", "measured", "measured", "pass", "pass"
    ]  # fmt: skip
    trained, written = rows[2]["driving"], rows[3]["driving"]
    assert trained["scores"] == written["scores"]
