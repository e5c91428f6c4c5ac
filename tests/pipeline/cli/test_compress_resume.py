"""A compression is resumed with the same model and version alone, and from an undamaged folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artefact import sha256_of_file
from pipeline.cli.main import main
from pipeline.compress import run as recipe
from pipeline.compress import walk as compress
from pipeline.compress.plan.plan import GroupPlan
from pipeline.output import partial_path
from tests.support.families import save_family

SETTINGS = ["--calibration", "self", "--windows", "4", "--window-length", "32"]


def weights_hash(folder: Path) -> str:
    return sha256_of_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(tmp_path_factory.mktemp("original") / "tiny", "qwen2"))


@pytest.fixture(scope="module")
def compressed(original: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that nothing disturbed; not to be written to."""
    folder = tmp_path_factory.mktemp("compressed") / "small"
    assert main(["compress", "-m", original, "-o", str(folder), *SETTINGS]) == 0
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "small"


@pytest.fixture
def interrupted(
    original: str,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """The output of a run that Ctrl-C stopped in its second layer."""
    factor = compress.submit_fit

    def stop_after_one(workers: Any, group: GroupPlan, *rest: Any) -> Any:
        if group.members[0].startswith("model.layers.1"):
            raise KeyboardInterrupt
        return factor(workers, group, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(compress, "submit_fit", stop_after_one)
        assert main(["compress", "-m", original, "-o", str(output), *SETTINGS]) == 130
    assert "with --resume continues" in capsys.readouterr().err
    return output


def test_a_run_goes_on_with_a_copy_of_its_model_and_not_with_another_of_the_same_name(
    interrupted: Path,
    original: str,
    compressed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = tmp_path / "elsewhere"
    shutil.copytree(original, copied)
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    arguments = ["compress", "-m", str(copied), "-o", str(interrupted), *SETTINGS, "--resume"]
    assert main(arguments) == 3
    assert "differs in model_files" in capsys.readouterr().err
    assert (partial_path(interrupted) / "layers" / "model.layers.0.safetensors").exists()
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(arguments) == 0
    assert weights_hash(interrupted) == weights_hash(compressed)


def test_a_run_of_another_version_is_not_gone_on_with(
    interrupted: Path,
    original: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recipe, "__version__", "another")
    arguments = ["compress", "-m", original, "-o", str(interrupted), *SETTINGS, "--resume"]
    assert main(arguments) == 3
    assert "differs in version" in capsys.readouterr().err


def damage_layers(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "layers" / "progress.json").write_text(content)

    return damage


def drop_groups(folder: Path) -> None:
    path = folder / "layers" / "progress.json"
    record = json.loads(path.read_text())
    record["values"]["layers"]["model.layers.0"]["groups"] = []
    path.write_text(json.dumps(record))


def make_layers_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "layers")
    (folder / "layers").write_text("x")


def make_all_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


@pytest.mark.parametrize(
    "damage",
    [*map(damage_layers, ("", '{"set', "[]", "{}", '{"sha256": 1, "values": []}')), drop_groups,
     make_layers_a_file, make_all_a_file],
)  # fmt: skip
def test_a_damaged_working_folder_is_said_to_be_one(
    damage: Callable[[Path], None],
    interrupted: Path,
    original: str,
    compressed: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(partial_path(interrupted))
    arguments = ["compress", "-m", original, "-o", str(interrupted), *SETTINGS]
    assert main([*arguments, "--resume"]) == 3
    message = capsys.readouterr().err
    assert "start afresh without --resume" in message
    assert "Traceback" not in message
    if damage is make_all_a_file:
        assert main(arguments) == 0
        assert weights_hash(interrupted) == weights_hash(compressed)
