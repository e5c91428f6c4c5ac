"""Average precision against COCO's published figure, a brute force, and cases done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.driving.sample import NO_BOXES
from pipeline.driving.scores import _average_precision, _ScoredImage

ORACLES = Path("/work/shared/data/driving/oracles")
CAR_AP, MEAN_AP, MEAN_AP50 = 66.14185519, 34.029392668, 55.3239004


def scored(boxes: list, scores: list, truth: list, ignored: list | None = None) -> _ScoredImage:
    found, true, crowd = (np.array(b, float).reshape(-1, 4) for b in (boxes, truth, ignored or []))
    return _ScoredImage(found, np.array(scores, float), true, crowd)


def scores(images: list[_ScoredImage]) -> np.ndarray:
    found = _average_precision(images)
    assert found is not None
    return found


def test_scores_of_scalabels_public_case_are_those_it_publishes() -> None:
    if not ORACLES.is_dir():
        pytest.skip(f"{ORACLES} is not here: Scalabel's test case is not ours to commit")
    truth = json.loads((ORACLES / "scalabel_track_sample_anns.json").read_text())
    said = json.loads((ORACLES / "scalabel_bbox_predictions.json").read_text())
    by_name = {frame["name"]: frame["labels"] or [] for frame in said}
    found = {}
    for category in ("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle"):

        def boxes(labels: list, crowd: bool = False, category: str = category) -> np.ndarray:
            found = [
                label["box2d"]
                for label in labels
                if label["category"] == category
                and label.get("attributes", {}).get("crowd", False) is crowd
            ]
            sides = [[b["x1"], b["y1"], b["x2"] + 1, b["y2"] + 1] for b in found]
            return np.array(sides, float).reshape(-1, 4)

        images = [
            _ScoredImage(
                boxes(by_name[frame["name"]]),
                np.array([p["score"] for p in by_name[frame["name"]] if p["category"] == category]),
                boxes(frame["labels"]),
                boxes(frame["labels"], crowd=True),
            )
            for frame in truth
        ]
        precision = _average_precision(images, tuple(np.linspace(0.5, 0.95, 10)))
        if precision is not None:
            found[category] = 100 * precision
    assert found["car"].mean() == pytest.approx(CAR_AP, abs=1e-6)
    assert np.mean([ap.mean() for ap in found.values()]) == pytest.approx(MEAN_AP, abs=1e-6)
    assert np.mean([ap[0] for ap in found.values()]) == pytest.approx(MEAN_AP50, abs=1e-6)
    assert "train" not in found  # none is there, so that it has no score


def test_a_perfect_answer_scores_one_and_a_set_without_boxes_nothing() -> None:
    box = [[0, 0, 10, 10]]
    np.testing.assert_array_equal(scores([scored(box, [0.9], box)]), [1.0])
    assert _average_precision([scored(box, [0.9], [])]) is None


def test_a_second_box_on_the_same_truth_is_wrong() -> None:
    truth = [[0, 0, 10, 10], [50, 0, 60, 10]]
    # Ranked: right, wrong, right. Precision is 1 up to half the recall, and 2/3 after it.
    images = [scored([truth[0], truth[0], truth[1]], [0.9, 0.8, 0.7], truth)]
    expected = (51 * 1 + 50 * 2 / 3) / 101
    np.testing.assert_allclose(scores(images), [expected], rtol=0, atol=1e-12)


def test_what_falls_on_a_crowd_does_not_count() -> None:
    truth, crowd = [[0, 0, 10, 10]], [[20, 0, 80, 40]]
    inside = [[30, 5, 40, 15], [50, 5, 60, 15]]
    images = [scored([*inside, truth[0]], [0.9, 0.8, 0.7], truth, crowd)]
    np.testing.assert_array_equal(scores(images), [1.0])


def test_boxes_are_ranked_over_the_set_and_not_in_batches() -> None:
    box, other = [0, 0, 10, 10], [30, 30, 40, 40]
    first = scored([box], [0.3], [box])
    second = scored([other], [0.9], [box])
    together = scores([first, second])
    alone = [scores([image]) for image in (first, second)]
    # One wrong box before one right box of two: precision 1/2 up to half the recall.
    np.testing.assert_allclose(together, [51 * 0.5 / 101])
    assert float(together[0]) != pytest.approx(float(np.mean([a[0] for a in alone])))


def test_agrees_with_a_brute_force_over_random_sets() -> None:
    rng = np.random.default_rng(0)
    images = []
    for _ in range(20):
        truth = rng.uniform(0, 80, (5, 2)).repeat(2, axis=0).reshape(5, 4)
        truth[:, 2:] += 12
        boxes = np.concatenate([truth + rng.normal(0, 2, truth.shape), truth + 40])
        images.append(_ScoredImage(boxes, rng.random(10), truth, NO_BOXES))
    precision = _average_precision(images, (0.5,))
    assert precision is not None
    np.testing.assert_allclose(precision[0], brute_force(images), rtol=0, atol=1e-12)


def brute_force(images: list[_ScoredImage]) -> float:
    """Precision at each recall, by walking down the ranking with a set of what was taken."""
    ranking = sorted(
        ((s, i, j) for i, image in enumerate(images) for j, s in enumerate(image.scores)),
        reverse=True,
    )
    taken, right, curve = set(), 0, []
    for rank, (_, i, j) in enumerate(ranking, 1):
        a = images[i].boxes[j]
        best, best_iou = None, 0.5
        for k, b in enumerate(images[i].truth):
            w = min(a[2], b[2]) - max(a[0], b[0])
            h = min(a[3], b[3]) - max(a[1], b[1])
            shared = max(w, 0) * max(h, 0)
            iou = shared / ((a[2] - a[0]) * (a[3] - a[1]) + 144 - shared)
            if (i, k) not in taken and iou >= best_iou:
                best, best_iou = k, iou
        if best is not None:
            taken.add((i, best))
            right += 1
        curve.append((right / 100, right / rank))
    levels = [max((p for r, p in curve if r >= t), default=0) for t in np.linspace(0, 1, 101)]
    return float(np.mean(levels))
