"""The ledger of classifiers: of a ViT trained here on scikit-learn's digits, and of stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.digits import Digits, make_digits
from pipeline.cli.main import main
from pipeline.errors import UsageError
from tests.support.ledger_stages import outputs_alive
from tests.support.old_objects import old_objects_set_aside
from validate.artefacts import Artefacts
from validate.classifier import CLASSIFIER, ImageOptions, _Inputs
from validate.ledger import run_ledger
from validate.record import Ledger
from validate.stages import Stage, Tolerance


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def read_ledger(folder: Path) -> Ledger:
    return Ledger.from_json(json.loads((folder / "ledger.json").read_text()))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """A ViT trained on scikit-learn's digits."""
    return make_digits(tmp_path_factory.mktemp("digits"))


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


@pytest.mark.slow
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


SCALES = np.array([[1.0], [2.0], [3.0]])  # of the three images of a batch


class Projection:
    """A linear classifier of 2 x 2 images of one channel, as a session."""

    def __init__(self, scale: np.ndarray | float = 1.0) -> None:
        self.name = "projection"
        weights = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
        self._weights, self._scale = weights, scale

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, 5], each image's times its scale."""
        logits = pixels.reshape(len(pixels), -1) @ self._weights
        return (logits * self._scale).astype(np.float32)


@pytest.fixture
def inputs() -> _Inputs:
    """Two batches of three images without labels."""
    pixels = np.random.default_rng(1).normal(size=(2, 3, 1, 2, 2)).astype(np.float32)
    return _Inputs(list(pixels), None)


def test_logits_are_freed_when_no_later_stage_needs_them(inputs: _Inputs) -> None:
    alive = []

    def opener() -> Projection:
        alive.append(outputs_alive())
        return Projection()

    references = {"a": None, "b": "a", "c": "b", "d": "c", "e": "c", "f": "a"}
    stages = [Stage(name, opener, reference) for name, reference in references.items()]
    with old_objects_set_aside():
        rows = run_ledger(stages, inputs, CLASSIFIER)
        assert all(row.to_original is not None for row in rows[1:])
        # When b opens there is a; then a, b; a, c twice, since e needs c; at last the original.
        assert alive == [0, 1, 2, 2, 2, 1]
        assert outputs_alive() == 0


def test_stages_of_classifiers_in_an_impossible_order_are_refused(inputs: _Inputs) -> None:
    later, original = Stage("later", Projection, "original"), Stage("original", Projection)
    with pytest.raises(UsageError, match="does not come before"):
        run_ledger([later, original], inputs, CLASSIFIER)
    with pytest.raises(UsageError, match="same name"):
        run_ledger([original, original], inputs, CLASSIFIER)


def test_a_classifier_fails_in_figures_an_image(inputs: _Inputs) -> None:
    def worse() -> Projection:
        return Projection(np.array([1, 2, 3, 4, 5]))

    tolerance = Tolerance(min_cosine=0.9999, max_kl=1e-6)
    rows = run_ledger(
        [Stage("original", Projection), Stage("worse", worse, "original", tolerance)],
        inputs,
        CLASSIFIER,
    )
    cosine, divergence = rows[1].verdict.reasons
    assert "at the worst image" in cosine
    assert "nats per image" in divergence


@pytest.mark.parametrize(
    ("scale", "passed", "status"), [(1.0, True, "pass"), (SCALES, False, "fail")]
)
def test_polygraphys_verdict_is_in_the_ledger_and_counts(
    inputs: _Inputs, scale: np.ndarray | float, passed: bool, status: str
) -> None:
    """Logits of every image are parallel, so that ours passes, but not those of a whole batch."""
    stage = Stage("s", lambda: Projection(scale), "original", Tolerance(min_cosine=0.9999))
    rows = run_ledger([Stage("original", Projection), stage], inputs, CLASSIFIER)
    comparison = rows[1].to_reference
    assert comparison is not None
    assert comparison.metrics.min_cosine == pytest.approx(1)
    assert comparison.polygraphy_passed is passed
    assert rows[1].verdict.status == status
    assert len(rows[1].verdict.reasons) == (not passed)
    written = Ledger(rows, inputs.describe(), {}).to_json()
    assert written["rows"][1]["to_reference"]["polygraphy_passed"] is passed
    del written["rows"][1]["to_reference"]["polygraphy_passed"]
    again = Ledger.from_json(written).rows[1].to_reference
    assert again is not None
    assert again.polygraphy_passed is None


@pytest.mark.parametrize("option", ["--text", "--windows", "--max-new-tokens"])
def test_options_of_texts_are_refused_for_a_classifier(
    option: str, sources: dict[str, Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = ("--original", str(sources["vit"]), "--images", str(images))
    assert main(["validate", *original, option, "40"]) == 2
    assert option in capsys.readouterr().err


def test_a_classifier_without_images_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(UsageError, match="validated on images"):
        ImageOptions(None).check(Artefacts("nowhere"))
