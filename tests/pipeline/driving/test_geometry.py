"""Letterbox, perspective, mosaic, flip: where pixels go, boxes and masks go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.driving.augment import (
    Amounts,
    Augmentation,
    _random_homography,
    _warp,
    batch_of,
    flipped,
    laid,
)
from pipeline.driving.letterbox import PAD, Letterbox
from pipeline.driving.mosaic import mosaic
from pipeline.driving.sample import Complaints, DrivingSet, Sample

sides = st.integers(1, 400)


def bright_box(box: tuple[int, int, int, int], size: tuple[int, int] = (60, 100)) -> Sample:
    """A dark image with one bright box, which is vehicle, road and lane at once."""
    x1, y1, x2, y2 = box
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    image = np.where(mask[..., None], 255, 0).repeat(3, axis=2).astype(np.uint8)
    boxes = np.array([box], np.float32)
    return Sample(image, boxes, np.zeros(1, np.int64), drivable=mask, lane=mask)


def extent(mask: np.ndarray | None) -> list[int]:
    assert mask is not None
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from([(64, 96), (192, 320), (32, 32)]))
def test_letterbox_brings_boxes_back_where_they_were(
    height: int, width: int, target: tuple[int, int]
) -> None:
    place = Letterbox.of((height, width), target)
    (top, left), (h, w) = place.offset, place.size
    assert 0 <= top <= target[0] - h
    assert 0 <= left <= target[1] - w
    boxes = np.array([[0, 0, width, height], [width / 3, height / 4, width / 2, height / 2]])
    np.testing.assert_allclose(place.boxes_back(place.boxes(boxes)), boxes, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(place.boxes(boxes)[0], [left, top, left + w, top + h], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(sides, sides)
def test_letterbox_keeps_shapes_and_fills_the_rest_with_grey(height: int, width: int) -> None:
    place = Letterbox.of((height, width), (64, 96))
    laid_image = place.image(np.zeros((height, width, 3), np.uint8))
    inside = np.zeros((64, 96), bool)
    (top, left), (h, w) = place.offset, place.size
    inside[top : top + h, left : left + w] = True
    assert (laid_image[inside] == 0).all()
    assert (laid_image[~inside] == PAD).all()
    assert place.mask(np.ones((height, width), bool)).tolist() == inside.tolist()
    assert place.mask_back(inside).all()


def test_a_mask_that_is_not_scaled_comes_back_the_same() -> None:
    mask = np.random.default_rng(0).random((64, 90)) < 0.3
    place = Letterbox.of((64, 90), (64, 96))
    np.testing.assert_array_equal(place.mask_back(place.mask(mask)), mask)


def test_a_lane_line_keeps_its_width_where_masks_are_shrunk() -> None:
    mask = np.zeros((720, 1280), bool)
    mask[:, 640:648] = True  # 8 pixels of 1280 are 2 of 320
    shrunk = Letterbox.of(mask.shape, (180, 320)).mask(mask)
    assert set(shrunk.sum(axis=1)) == {2}


def test_a_homography_takes_boxes_where_it_takes_pixels() -> None:
    sample = bright_box((30, 20, 60, 40))
    rng = np.random.default_rng(0)
    for _ in range(20):
        matrix = _random_homography((60, 100), Amounts(degrees=0, shear=0, perspective=0), rng)
        warped = _warp(sample, matrix)
        assert warped.boxes is not None
        np.testing.assert_allclose(warped.boxes[0], extent(warped.image[..., 0] > 127), atol=1.01)
        np.testing.assert_allclose(warped.boxes[0], extent(warped.drivable), atol=1.01)


def test_a_rotated_box_surrounds_what_it_surrounded() -> None:
    sample = bright_box((30, 20, 60, 40))
    rng = np.random.default_rng(1)
    for _ in range(20):
        warped = _warp(sample, _random_homography((60, 100), Amounts(), rng))
        assert warped.boxes is not None
        x1, y1, x2, y2 = extent(warped.lane)
        box = warped.boxes[0]
        assert box[0] <= x1 + 1
        assert box[1] <= y1 + 1
        assert box[2] >= x2 - 1
        assert box[3] >= y2 - 1


def test_the_identity_changes_nothing() -> None:
    sample = bright_box((3, 2, 60, 40))
    warped = _warp(sample, np.eye(3))
    np.testing.assert_array_equal(warped.image, sample.image)
    np.testing.assert_array_equal(warped.boxes, sample.boxes)
    np.testing.assert_array_equal(warped.lane, sample.lane)


def test_a_box_that_leaves_the_picture_goes() -> None:
    away = np.eye(3)
    away[0, 2] = 95
    warped = _warp(bright_box((10, 20, 60, 40)), away)
    assert warped.boxes is not None
    assert len(warped.boxes) == len(warped.classes) == 0


def test_a_mosaic_is_made_of_its_four_quarters() -> None:
    samples = [bright_box((30, 20, 60, 40)) for _ in range(4)]
    whole = mosaic(samples, np.random.default_rng(0))
    assert whole.boxes is not None
    assert whole.drivable is not None
    covered = np.zeros((60, 100), bool)
    for x1, y1, x2, y2 in whole.boxes.astype(int):
        covered[y1:y2, x1:x2] = True
    # Boxes of which too little is left are gone; all others lie on bright pixels.
    assert (whole.drivable[covered]).all()
    assert (whole.image[whole.drivable] == 255).all()
    assert len(whole.boxes) >= 2


def test_a_mosaic_knows_only_what_all_four_know() -> None:
    samples = [bright_box((30, 20, 60, 40)) for _ in range(4)]
    bare = Sample(samples[0].image, drivable=samples[0].drivable)
    whole = mosaic([*samples[:3], bare], np.random.default_rng(0))
    assert whole.boxes is None
    assert whole.lane is None
    assert whole.drivable is not None


def test_a_flip_is_its_own_inverse_and_moves_boxes_with_pixels() -> None:
    sample = bright_box((30, 20, 60, 40))
    turned = flipped(sample)
    assert turned.boxes is not None
    assert extent(turned.lane) == list(turned.boxes[0])
    again = flipped(turned)
    np.testing.assert_array_equal(again.image, sample.image)
    np.testing.assert_array_equal(again.boxes, sample.boxes)


def test_chance_is_the_seeds_and_labels_keep_to_what_is_known() -> None:
    bare = Sample(bright_box((30, 20, 60, 40)).image)
    samples = [bright_box((30, 20, 60, 40)), bare]
    data = DrivingSet("test", ["a", "b"], samples.__getitem__, Complaints())
    chance = Augmentation(1.0, Amounts(), 0.5, 0.3)
    first, second = (chance.drawn(data, 0, (64, 96), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    batch = batch_of([laid(s, (64, 96)) for s in samples])
    assert batch.known.tolist() == [[True] * 3, [False] * 3]
    assert batch.pixels.shape == (2, 3, 64, 96)
    assert float(batch.pixels.max()) == pytest.approx(1.0)
