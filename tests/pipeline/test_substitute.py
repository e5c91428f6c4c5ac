"""`skipcat substitute`: a model in few bytes that fits the model it drafts for, or a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline
from pipeline.artefact import sha256_of_file
from pipeline.cli.main import main
from pipeline.errors import InputError, UsageError
from pipeline.export.contract import WEIGHTS_FILE
from pipeline.export.export import ExportRequest, export_folder
from pipeline.output import partial_path
from pipeline.runtime.draft_model import open_drafted
from pipeline.runtime.drafting import Chooser
from pipeline.substitute import _require_use
from tests.support.classifiers import save_classifier
from tests.support.families import save_family
from tests.support.tiny_decoder import write_record

MAX_LENGTH = 96
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True}
BUDGET = 60_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and `text` and `target`, its export in float32, beside it."""
    root = tmp_path_factory.mktemp("substitute")
    letters = np.random.default_rng(0).integers(97, 123, 3000, np.uint8)
    (root / "text").write_bytes(letters.tobytes())
    folder = save_family(root / "model", "llama", **SHAPE)
    wanted = ExportRequest("cpu", max_length=MAX_LENGTH, weights="float")
    export_folder(folder, root / "target", wanted)
    return folder


def arguments(model: Path, output: Path, *further: str) -> list[str]:
    few = ["--calibration", str(model.parent / "text"), "--windows", "8"]
    few += ["--window-length", "32", "--effort", "fast", "--memory", f"{BUDGET}"]
    return ["substitute", str(model), "-o", str(output), *few, *further]


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    """What the command made for the target; not to be written to."""
    target = str(model.parent / "target")
    assert main(arguments(model, model.parent / "small", "--target", target)) == 0
    return model.parent / "small"


def test_it_is_an_export_that_drafts_for_its_target_within_its_bytes(
    model: Path, made: Path
) -> None:
    assert (made / WEIGHTS_FILE).stat().st_size <= BUDGET
    record = json.loads((made / "export.json").read_text())
    assert record["max_length"] == MAX_LENGTH
    assert record["recipe"]["settings"]["memory"] == str(BUDGET)
    session, drafts = open_drafted(model.parent / "target", made)
    assert drafts is not None
    session.prefill(0, np.array([5, 6, 7]))
    assert len(drafts.grow(0, 3, 8, 3, Chooser).draft()) > 0


def test_nothing_but_the_export_is_left(made: Path) -> None:
    assert not partial_path(made).exists()
    assert [path for path in made.iterdir() if path.is_dir()] == []
    assert not {"build.json", "plan.json"} & {path.name for path in made.iterdir()}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_bytes(
    model: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, target = tmp_path / "small", ("--target", str(model.parent / "target"))

    def interrupt(*rest: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.substitute.export_folder", interrupt)
        assert main(arguments(model, output, *target)) == 130
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.substitute.compress_to_folder", interrupt)
        other = [*arguments(model, output, *target, "--resume"), "--seed", "9"]
        assert main(other) == 2  # of another seed: nothing is taken up
        patch.setattr("pipeline.substitute._require_use", interrupt)  # after the files were moved
        assert main(arguments(model, output, *target, "--resume")) == 130
        patch.undo()
    monkeypatch.setattr("pipeline.substitute.compress_to_folder", interrupt)
    assert main(arguments(model, output, *target, "--resume")) == 0
    for name in ("model.onnx", WEIGHTS_FILE):
        assert sha256_of_file(output / name) == sha256_of_file(made / name)


def test_the_face_takes_the_same_settings(model: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="length of the cache"):
        pipeline.substitute(
            str(model), tmp_path / "small", "60KB", target=model.parent / "target", max_length=9
        )
    with pytest.raises(UsageError, match="exists already"):
        pipeline.substitute(str(model), made, "60KB", seed=1)
    with pytest.raises(UsageError, match="cache of its target"):
        pipeline.substitute(str(model), tmp_path / "small", "60KB", keep_cache=0.5)


def test_without_a_target_it_has_to_run(made: Path, tmp_path: Path) -> None:
    _require_use(made, None)
    broken = shutil.copytree(made, tmp_path / "broken")
    (broken / WEIGHTS_FILE).write_bytes(bytes((made / WEIGHTS_FILE).stat().st_size))
    with pytest.raises(InputError):
        _require_use(broken, None)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--memory", "5000"], 2, "the embedding alone does not fit"),
        (["--memory", "12KB"], 2, "smallest choice everywhere"),
        (["--memory", "much"], 2, "no number of bytes"),
        (["--target", "TARGET", "--max-length", "96"], 2, "leave --max-length out"),
        (["--max-length", "1"], 2, "too short"),
        (["--window-length", "4096"], 2, "--window-length"),
        (["--calibration", "/nowhere/text"], 3, "/nowhere/text"),
        (["--target", "OTHER"], 3, "num_layers 2"),
        (["--target", "MODEL"], 2, "two exports of the profile"),
    ],
)
def test_what_cannot_be_made_is_refused_and_leaves_nothing(
    flags: list[str],
    status: int,
    message: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"TARGET": model.parent / "target", "MODEL": model, "OTHER": tmp_path / "other"}
    if "OTHER" in flags:
        shutil.copytree(model.parent / "target", tmp_path / "other")
        write_record(tmp_path / "other", "cpu", num_layers=3)
    given = [str(places.get(flag, flag)) for flag in flags]
    assert main(arguments(model, tmp_path / "small", *given)) == status
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "small").exists()


def test_a_target_with_another_tokenizer_or_a_rounded_cache_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(model.parent / "target", tmp_path / "other")
    words = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(words + "\n")
    assert main(arguments(model, tmp_path / "small", "--target", str(other))) == 3
    assert "tokenizer is another one" in capsys.readouterr().err
    record = json.loads((other / "export.json").read_text())
    (other / "export.json").write_text(json.dumps(record | {"cache_format": "int8"}))
    assert main(arguments(model, tmp_path / "small", "--target", str(other))) == 3
    assert "cannot be shared" in capsys.readouterr().err


def test_a_classifier_and_a_folder_that_is_there_are_refused(
    model: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = save_classifier(tmp_path / "images", "vit")
    assert main(arguments(images, tmp_path / "small")) == 3
    assert "decoder language models" in capsys.readouterr().err
    assert main(arguments(model, made)) == 2
    assert "exists already" in capsys.readouterr().err
