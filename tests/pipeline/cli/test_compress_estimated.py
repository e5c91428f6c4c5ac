"""`skipcat compress --estimate`: what a compression would take, of models and of shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench import shapes
from pipeline.bench.shapes import Shape
from pipeline.cli.main import main
from pipeline.model import load
from tests.support.tiny_decoder import save_tiny_folder


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> str:
    """A shape that is timed in a second."""
    found = Shape("llama", 64, 128, 4, 4, 2, 16, 300, True, 64)
    monkeypatch.setitem(shapes._SHAPES, "narrow-4", found)
    return "narrow-4"


def test_a_shape_is_estimated_though_nobody_has_it(
    narrow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "-m", narrow, "--estimate", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("narrow-4, effort default, 8 workers of 1 thread: about ")
    assert " GB; moved: " in lines[3]
    assert lines[4] == "  from one layer, that was timed on this machine"


def test_a_folder_is_estimated_without_reading_its_weights_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_folder(tmp_path / "model")
    monkeypatch.delattr(load, "load_model")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["compress", "-m", str(model), "--estimate", "0", "--effort", "fast", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == str(model)
    assert found["workers"] == found["moved_bytes"] == 0
    assert 0 < found["hours"] < 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["-m", "no-such-model", "--estimate", "1"], 3, "no-such-model"),
        (["--estimate", "-1"], 2, "--estimate"),
        (["--estimate", "1", "--method", "svd-llm"], 2, "survey the model"),
        (["--estimate", "1", "--keep-params", "2"], 2, "--keep-params"),
        ([], 2, "Missing option '-o' / '--output'"),
    ],
    ids=str,
)
def test_what_cannot_be_estimated_is_refused(
    arguments: list[str], status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", *arguments]) == status
    assert words in capsys.readouterr().err
