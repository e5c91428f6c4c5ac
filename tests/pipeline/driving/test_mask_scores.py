"""Scores of masks against BDD100K's published figures and against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.driving.scores import _MaskCounts, _NearCounts

LANES = Path("/work/shared/data/driving/oracles/bdd100k_lane")
# Of bdd100k's own test: direction 0 and 1, style 0 and 1, categories 0 to 6 and the background.
PUBLISHED = {
    1: [70.53328267, 100, 70.53328267, 100, 99.82147748, 100, 100, 75.33066961, 71.02916505, 100,
        96.43828133, 94.79621737],
    2: [80.9831119, 100, 80.9831119, 100, 100, 100, 100, 79.34917317, 86.25984707, 100, 100, 100],
    5: [100.0] * 12,
}  # fmt: skip


def test_f_of_bdd100ks_public_case_is_what_it_publishes() -> None:
    if not LANES.is_dir():
        pytest.skip(f"{LANES} is not here: BDD100K's test case is not ours to commit")
    pairs = [
        tuple(np.array(Image.open(LANES / side / path.name)) for side in ("gts", "res"))
        for path in sorted((LANES / "gts").iterdir())
    ]
    found = []
    for shift, bits, classes in ((5, 1, 2), (4, 1, 2), (0, 7, 8)):
        for number in range(classes):
            masks = [
                [((m >> shift & bits) == number) & ((m & 8) == 0) for m in pair] for pair in pairs
            ]
            counts = [_NearCounts.of(t, f, tuple(PUBLISHED)) for t, f in masks]
            found.append(
                [100 * np.mean([c.f for c in image]) for image in zip(*counts, strict=True)]
            )
    expected = np.array(list(PUBLISHED.values())).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_counts_agree_with_counting_by_hand() -> None:
    truth = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
    found = np.array([[1, 0, 1, 0], [1, 0, 0, 0]], bool)
    counts = _MaskCounts.of(truth, found)
    assert counts == _MaskCounts(hit=2, wrong=1, missed=1, rest=4)
    assert counts.iou == 2 / 4
    assert counts.mean_iou == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert counts.recall == pytest.approx(2 / 3)
    assert counts.balanced_accuracy == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_a_set_is_divided_once_so_that_batches_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.random((6, 2, 5, 7)) < np.linspace(0.1, 0.9, 6)[:, None, None, None]
    each = [_MaskCounts.of(*pair) for pair in pairs]
    whole = _MaskCounts.of(pairs[:, 0], pairs[:, 1])
    assert sum(each[:2], _MaskCounts()) + sum(each[2:], _MaskCounts()) == whole
    means = np.mean([counts.iou for counts in each])
    assert whole.iou != pytest.approx(means)  # what a mean over batches would say


def test_nothing_to_find_is_no_score() -> None:
    nothing = np.zeros((3, 3), bool)
    assert _MaskCounts.of(nothing, nothing).iou is None
    assert _NearCounts.of(nothing, nothing, (1,))[0].f == 1.0
    assert _NearCounts.of(nothing, ~nothing, (1,))[0].f == 0.0


def test_a_line_one_pixel_beside_the_truth_is_near_it() -> None:
    truth, found = np.zeros((2, 9, 9), bool)
    truth[:, 4] = found[:, 6] = True
    assert _MaskCounts.of(truth, found).iou == 0
    assert [counts.f for counts in _NearCounts.of(truth, found, (1, 2))] == [0, 1]
