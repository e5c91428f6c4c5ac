from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.cli.main import main
from tests.support.families import save_family


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_family(tmp_path / "model", "llama")


def export(checkpoint: Path, output: Path, *flags: str) -> int:
    return main(["export", str(checkpoint), "-o", str(output), *flags])


def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        assert export(folder, tmp_path / "onnx") == 3
        message = capsys.readouterr().err
        assert "Not a checkpoint folder" in message
        assert str(folder) in message
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_weight_file_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert export(checkpoint, tmp_path / "onnx") == 3
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_a_missing_tensor_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert export(checkpoint, tmp_path / "onnx") == 3
    assert "model.layers.0.mlp.down_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_an_existing_output_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "mine.txt").write_text("mine")
    # Looking for the checkpoint would end in status 3.
    assert export(tmp_path / "nothing", tmp_path / "onnx") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "onnx").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "flags",
    [["--max-length", "1"], ["--profile", "opset99"], ["--dtype", "int8"], ["--max-length", "x"]],
)
def test_a_choice_that_makes_no_sense_is_refused_before_loading(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path / "nothing", tmp_path / "onnx", *flags) == 2
    assert flags[0] in capsys.readouterr().err
