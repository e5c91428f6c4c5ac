"""The ladder of a driving network: its warning, its rows, and what is said to be won back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality.driving_ladder import _published, _rungs, _under_one_scale, _won_back
from pipeline.driving.evaluate import MapsOfBatch
from pipeline.driving.letterbox import Letterbox
from pipeline.driving.network import QyolopConfig
from tests.support.tiny_driving import SIZE, pixels_of, tiny_driving


def test_under_one_scale_with_boxes_no_score_is_left_and_masks_are_as_they_were() -> None:
    with torch.no_grad():
        maps = MapsOfBatch.of(tiny_driving()(torch.from_numpy(pixels_of(2))))
    anchors, placed = QyolopConfig(SIZE, 4).anchors, Letterbox.of(SIZE, SIZE)
    assert len(maps.seen(0, anchors, placed, 0.01).boxes) > 0
    warned = _under_one_scale(maps, (192, 320))
    assert len(warned.seen(0, anchors, placed, 0.01).boxes) == 0
    assert np.array_equal(warned.lane, maps.lane)
    # With so many bits that a step is small beside a score, boxes and scores are what they were.
    fine = _under_one_scale(maps, (192, 320), 30)
    for own, other in zip(maps.boxes, fine.boxes, strict=True):
        seen, left = (1 / (1 + np.exp(-np.clip(raw, -50, 50))) for raw in (own, other))
        np.testing.assert_allclose(seen, left, atol=1e-6)


def test_every_width_has_its_rungs_and_the_warning_stands_once() -> None:
    rows = _rungs([8, 4])
    assert rows[0] == ("float", None)
    assert len(rows) == 2 + 6 + 5
    assert sum("one scale" in name for name, _ in rows) == 1


def test_what_is_won_back_is_measured_against_float_of_the_same_steps() -> None:
    assert _won_back(0.75, 0.5, 1.0) == 0.5
    assert _won_back(0.75, 0.5, 0.5) is None
    names = [("float", None), ("float, further steps", None), ("PTQ histogram MSE per channel", 4),
             ("QAT distilled", 4)]  # fmt: skip
    rows = []
    for (name, bits), score in zip(names, (0.8, 1.0, 0.5, 0.75), strict=True):
        of_tasks = dict.fromkeys(("ap50", "drivable_miou", "lane_iou"), score)
        draws = {task: [score, score + 0.1] for task in of_tasks}
        rows.append({"name": name, "bits": bits, "scores": of_tasks, "draws": draws})
    found = _published(rows)
    assert found[3]["won_back"]["lane_iou"] == 0.5
    assert found[3]["standard_errors"]["ap50"] == pytest.approx(0.1 / 2**0.5)
    # The same draws moved both alike.
    assert found[3]["standard_errors_of_difference_to_float"]["ap50"] == pytest.approx(0, abs=1e-9)
    assert "draws" not in found[0]
