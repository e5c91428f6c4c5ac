"""A ViT trained here on scikit-learn's digits, through every stage, on images it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.digits import Digits
from pipeline.cli.main import main
from validate.record import Ledger


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def read_ledger(folder: Path) -> Ledger:
    return Ledger.from_json(json.loads((folder / "ledger.json").read_text()))


@pytest.fixture(scope="module")
def build(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed to 0.6 and exported, by the command line."""
    folder = tmp_path_factory.mktemp("build")
    compress = ("compress", "-m", digits.model, "--calibration", digits.train)
    run(*compress, "-o", folder / "checkpoint", "--keep-params", 0.6)
    run("export", folder / "checkpoint", "-o", folder / "onnx")
    return folder


@pytest.fixture(scope="module")
def ledger(build: Path, digits: Digits) -> Ledger:
    """Held-out images through every stage."""
    run("validate", build, "--images", digits.test)
    return read_ledger(build / "ledger")


def test_the_trained_model_and_the_compressed_one_are_accurate(ledger: Ledger) -> None:
    found = {row.name: row.accuracy for row in ledger.rows}
    original, compressed = found["original"], found["compressed, skip form"]
    assert original is not None
    assert compressed is not None
    assert original.images == 360
    assert original.value >= 0.95
    # Within one standard error of the original's accuracy.
    assert compressed.value >= original.value - 0.011


def test_every_later_stage_equals_the_one_before(ledger: Ledger) -> None:
    verdicts = {row.name: row.verdict.status for row in ledger.rows}
    assert verdicts == {
        "original": "measured",
        "compressed, dense product": "measured",
        "compressed, skip form": "pass",
        "onnxruntime onnx": "pass",
    }


def test_the_reports_show_accuracy(build: Path, ledger: Ledger) -> None:
    assert ledger.inputs["images"]["labelled"]
    page = (build / "ledger" / "ledger.html").read_text()
    assert '<th title="Images classified as labelled' in page
    assert "perplexity" not in page.lower()


def test_two_fifths_of_the_bytes_in_few_bits_stay_accurate(digits: Digits, tmp_path: Path) -> None:
    run(
        "compress", "-m", digits.model, "--calibration", digits.train, "--effort", "fast",
        "-o", tmp_path / "small", "--keep-bytes", 0.4,
    )  # fmt: skip
    run(
        "validate", "--checkpoint", tmp_path / "small", "--images", digits.test,
        "-o", tmp_path / "ledger",
    )  # fmt: skip
    rows = {row.name: row for row in read_ledger(tmp_path / "ledger").rows}
    accuracy = rows["compressed, skip form"].accuracy
    assert accuracy is not None
    assert accuracy.value >= 0.93
