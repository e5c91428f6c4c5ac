"""Scores of a set out of what was seen in each image."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.driving.perceive import Perception
from pipeline.driving.sample import Sample
from pipeline.driving.scenes.domain import DOMAINS
from pipeline.driving.scenes.scene import draw_scene
from pipeline.driving.scores import ImageScore, scores_of, standard_errors

SIZE = (64, 96)


def perfect(sample: Sample) -> Perception:
    assert sample.boxes is not None
    assert sample.drivable is not None
    assert sample.lane is not None
    scores = np.linspace(0.9, 0.5, len(sample.boxes))
    return Perception(sample.boxes, scores, sample.classes, sample.drivable, sample.lane)


def test_an_answer_that_is_the_truth_scores_one_everywhere() -> None:
    samples = [draw_scene(seed, DOMAINS["wide"], SIZE).sample() for seed in range(6)]
    images = [ImageScore.of(perfect(sample), sample) for sample in samples]
    assert set(scores_of(images).values()) == {1.0}
    assert standard_errors(images, ["ap50", "lane_iou"], draws=5) == {"ap50": 0.0, "lane_iou": 0.0}


def test_a_kind_that_is_not_known_is_not_scored() -> None:
    sample = draw_scene(0, DOMAINS["wide"], SIZE).sample()
    bare = Sample(sample.image, drivable=sample.drivable)
    scores = scores_of([ImageScore.of(perfect(sample), bare)])
    assert scores["drivable_miou"] == 1.0
    assert scores["ap50"] is scores["recall50"] is scores["lane_iou"] is scores["lane_f1"] is None


def test_recall_counts_only_boxes_that_a_user_sees() -> None:
    sample = Sample(np.zeros((*SIZE, 3), np.uint8), np.array([[0, 0, 9, 9], [20, 0, 29, 9.0]]))
    nothing = np.zeros(SIZE, bool)
    seen = Perception(
        np.asarray(sample.boxes), np.array([0.9, 0.1]), np.zeros(2, int), nothing, nothing
    )
    scores = scores_of([ImageScore.of(seen, sample)])
    assert scores["recall50"] == 0.5
    assert scores["ap50"] == pytest.approx(1.0)
