"""Every command and a driving network: what looks at images does, all others refuse by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.main import main
from pipeline.model.task import DRIVING, task_of_folder
from tests.support.tiny_driving import save_driving


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_driving(tmp_path_factory.mktemp("driving") / "net")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "road.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_an_image_is_a_line_of_json_and_a_picture(
    net: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(net), "--image", str(image), "-o", str(tmp_path / "seen")]
    assert main([*arguments, "--json"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["image"], line["width"], line["height"]) == ("road.png", 80, 50)
    assert line["lanes"]
    assert all(0 <= x <= 80 and 0 <= y <= 50 for points in line["lanes"] for x, y in points)
    assert line["ms"]["lanes"] > 0
    assert (tmp_path / "seen" / line["drawn"]).is_file()
    assert main([*arguments, "--overwrite"]) == 0
    assert capsys.readouterr().out.startswith("road.png: ")


def test_compress_names_the_method_that_rounds_convolutions(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "-m", str(net), "-o", str(tmp_path / "out")]) == 3
    assert "--method int8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "NET", "-p", "hello"],
        ["serve", "NET"],
        ["bench", "NET"],
        ["build", "-m", "NET", "-o", "OUT"],
        ["recover", "NET", "-o", "OUT", "--text", "IMAGE", "--steps", "2"],
        ["evaluate", "NET", "--prompt", "hello"],
        ["export", "NET", "-o", "OUT", "--profile", "cpu", "--cache", "int8"],
    ],
)
def test_commands_for_language_models_name_what_was_given_and_what_takes_it(
    arguments: list[str],
    net: Path,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"NET": str(net), "OUT": str(tmp_path / "out"), "IMAGE": str(image)}
    assert main([places.get(word, word) for word in arguments]) == 3
    said = capsys.readouterr().err
    assert "a driving perception network" in said
    assert "run with --image or --video" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--image", "IMAGE", "-p", "hello"], 2, "takes no prompt"),
        (["--image", "IMAGE", "--temperature", "1"], 2, "--temperature"),
        (["-o", "OUT"], 2, "nothing to look at"),
        (["--image", "IMAGE", "-o", "NET"], 2, "holds an input"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    arguments: list[str],
    status: int,
    words: str,
    net: Path,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"NET": str(net), "OUT": str(tmp_path / "out"), "IMAGE": str(image)}
    given = [places.get(word, word) for word in arguments]
    assert main(["run", str(net), *given]) == status
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_language_model_looks_at_no_image(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert main(["run", str(tmp_path), "--image", str(image)]) == 3
    assert "a decoder language model" in capsys.readouterr().err


def test_an_engine_says_its_task_by_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"onnx": {"task": DRIVING}}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert task_of_folder(tmp_path) == DRIVING


def test_inspect_says_what_the_network_finds(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(net), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"] == DRIVING
    assert facts["pixel values"] == "3x64x96"
    assert facts["convolutions"] == "65, of which 35 are 1x1"
