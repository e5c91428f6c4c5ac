"""The ledger of driving networks: a small random one, and copies that are changed on purpose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import entropy

from pipeline.driving.data import open_data
from pipeline.driving.evaluate import MapsOfBatch
from pipeline.driving.train import _score_model
from pipeline.errors import UsageError
from pipeline.runtime.sessions.driving_sessions import TorchDriving
from tests.support.tiny_driving import SIZE, save_driving, tiny_driving
from validate.artefacts import Artefacts
from validate.driving import (
    _CHIEF,
    DRIVING_NETWORK,
    _DrivingOptions,
    _Inputs,
    _load,
    _mask_kl,
    _measure,
)
from validate.ledger import run_ledger
from validate.record import Ledger, Row
from validate.report import build_table, reported
from validate.run import ValidateRequest
from validate.stages import Stage, Tolerance

DATA = "scenes:wide:12"
CLOSE = Tolerance(min_cosine=0.99999, max_kl_to_reference=1e-5, max_score_drop=0.003)


class Changed(TorchDriving):
    """The network with something else for its lanes or boxes."""

    def __init__(self, lane: float = 1.0, boxes: float = 0.0) -> None:
        super().__init__(tiny_driving(), "changed")
        self._lane, self._boxes = lane, boxes

    def maps(self, pixels: np.ndarray) -> MapsOfBatch:
        own = super().maps(pixels)
        boxes = tuple(level + np.float32(self._boxes) for level in own.boxes)
        return replace(own, boxes=boxes, lane=own.lane * np.float32(self._lane))


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_driving(tmp_path_factory.mktemp("driving") / "net")


@pytest.fixture(scope="module")
def inputs(net: Path) -> _Inputs:
    loaded = _load(str(net), _DrivingOptions(DATA, None, 12), 0, False, lambda message: None)
    assert isinstance(loaded.inputs, _Inputs)
    return loaded.inputs


def rows_of(inputs: _Inputs, **changes: float) -> list[Row]:
    original = Stage("original", lambda: TorchDriving(tiny_driving(), "torch"))
    later = Stage("later", lambda: Changed(**changes), "original", CLOSE)
    return run_ledger([original, later], inputs, DRIVING_NETWORK)


def test_the_same_network_passes_with_the_same_scores(inputs: _Inputs) -> None:
    original, later = rows_of(inputs)
    assert later.verdict.status == "pass"
    assert original.driving is not None
    assert later.driving is not None
    assert later.driving.scores == original.driving.scores
    assert later.driving.to_original == {"boxes_f": 1.0, "drivable_iou": 1.0, "lane_iou": 1.0}
    assert original.driving.to_original is None
    assert later.to_original is not None
    assert later.to_original.metrics.kl_mean == 0
    assert later.to_original.metrics.top1_agreement == 1


def test_scores_are_those_of_training(inputs: _Inputs) -> None:
    row = rows_of(inputs)[0]
    assert row.driving is not None
    wanted = _score_model(tiny_driving(), open_data(DATA, "val", SIZE), 12)
    assert row.driving.images == wanted["images"] == 12
    assert row.driving.scores == pytest.approx(wanted["scores"], abs=1e-6)


def test_lanes_that_are_turned_round_fail_and_are_named(inputs: _Inputs) -> None:
    later = rows_of(inputs, lane=-1.0)[1]
    assert later.verdict.status == "fail"
    assert any("nats per pixel of the masks" in reason for reason in later.verdict.reasons)
    assert later.driving is not None
    assert later.driving.to_original is not None
    assert later.driving.to_original["lane_iou"] == 0
    assert later.driving.to_original["drivable_iou"] == 1


def test_a_score_that_drops_is_a_complaint_even_where_maps_are_near(inputs: _Inputs) -> None:
    outputs = _measure("x", TorchDriving(tiny_driving(), "x"), inputs, {})
    before = outputs.scores["lane_iou"]
    assert before is not None
    better = replace(outputs, scores=outputs.scores | {"lane_iou": before + 0.01})
    assert outputs.complaints(CLOSE, outputs) == []
    (complaint,) = outputs.complaints(CLOSE, better)
    assert "lane_iou is 0.0100 below" in complaint


def test_kl_of_masks_is_that_of_the_decisions() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 4, (2, 50))
    p, q = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b))
    np.testing.assert_allclose(_mask_kl(a, b), entropy([p, 1 - p], [q, 1 - q]), rtol=1e-9)


def test_images_without_labels_are_compared_alone(inputs: _Inputs) -> None:
    rows = rows_of(replace(inputs, truth=None), boxes=0.5)
    assert rows[0].driving is not None
    assert rows[0].driving.scores == {}
    assert rows[1].driving is not None
    assert rows[1].driving.to_original is not None
    assert rows[1].driving.to_original["lane_iou"] == 1
    # Masks are thirty times as many numbers, and the same: only the maps of boxes can tell.
    assert any("at the worst image" in reason for reason in rows[1].verdict.reasons)


def test_the_reports_show_every_chief_score_and_read_back(inputs: _Inputs, tmp_path: Path) -> None:
    ledger = Ledger(rows_of(inputs), inputs.describe(), {})
    heads = [str(column.header) for column in build_table(ledger).columns]
    assert [name.replace("_", " ") in heads for name in _CHIEF] == [True] * len(_CHIEF)
    assert "pixel" in heads
    reported(lambda: ledger, tmp_path / "ledger")
    again = Ledger.from_json(json.loads((tmp_path / "ledger" / "ledger.json").read_text()))
    assert again.rows[1].driving == ledger.rows[1].driving
    page = (tmp_path / "ledger" / "ledger.html").read_text()
    assert "IoU of lane pixels" in page
    assert "perplexity" not in page.lower()


@pytest.mark.parametrize(
    "given", [{"text": "a.txt", "data": DATA}, {}, {"data": DATA, "images": "somewhere"}]
)
def test_options_of_others_and_two_sets_or_none_are_refused(
    net: Path, given: dict[str, Any]
) -> None:
    artefacts = Artefacts(str(net))
    with pytest.raises(UsageError):
        ValidateRequest.of(artefacts, **given).options.check(artefacts)
