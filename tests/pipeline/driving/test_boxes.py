"""Boxes against formulas written another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.driving.boxes import pairwise_iou, suppress
from pipeline.driving.loss import _complete_iou, _place_boxes


def random_boxes(count: int, seed: int) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, 20, (count, 2, 2))
    return np.concatenate((corners.min(axis=1), corners.max(axis=1) + 1), axis=1)


def test_iou_is_what_counting_cells_gives() -> None:
    a, b = random_boxes(6, 0).round(), random_boxes(5, 1).round()
    grid = np.stack(np.meshgrid(np.arange(30), np.arange(30)), axis=-1) + 0.5

    def cells(box: np.ndarray) -> np.ndarray:
        inside: np.ndarray = np.all((grid > box[:2]) & (grid < box[2:]), axis=-1)
        return inside

    expected = [[(cells(x) & cells(y)).sum() / (cells(x) | cells(y)).sum() for y in b] for x in a]
    np.testing.assert_allclose(pairwise_iou(a, b), expected)


def test_complete_iou_is_iou_where_boxes_share_centre_and_shape() -> None:
    a, b = torch.tensor([[0.0, 0, 8, 4]]), torch.tensor([[2.0, 1, 6, 3]])
    iou, complete = _complete_iou(a, b)
    assert float(iou) == pytest.approx(0.25)
    assert float(complete) == pytest.approx(0.25)


def test_complete_iou_pulls_boxes_together_that_do_not_touch() -> None:
    a = torch.tensor([[0.0, 0, 4, 4]], requires_grad=True)
    iou, complete = _complete_iou(a, torch.tensor([[10.0, 0, 14, 4]]))
    complete.sum().backward()
    assert float(iou.detach()) == 0
    assert a.grad is not None
    assert float(a.grad[0, [0, 2]].sum()) > 0  # more to the right is better
    # 1 - IoU is 1, and the distance costs 10^2 over 14^2 + 4^2.
    assert float(complete.detach()) == pytest.approx(-100 / 212, abs=1e-5)


def test_raw_zeros_place_the_anchor_in_the_middle_of_its_cell() -> None:
    placed = _place_boxes(torch.zeros(1, 4), torch.tensor([[3.0, 5]]), torch.tensor([[4.0, 2]]))
    np.testing.assert_allclose(placed, [[1.5, 4.5, 5.5, 6.5]])


def test_suppression_agrees_with_trying_all_pairs() -> None:
    boxes, scores = random_boxes(40, 2), np.random.default_rng(3).random(40)
    kept = suppress(boxes, scores, 0.4)
    overlap = pairwise_iou(boxes, boxes)
    assert list(scores[kept]) == sorted(scores[kept], reverse=True)
    for place in range(40):
        better = [k for k in kept if scores[k] > scores[place]]
        assert (place in kept) == (not any(overlap[k, place] > 0.4 for k in better))


def test_no_boxes_are_no_boxes() -> None:
    assert pairwise_iou(np.zeros((0, 4)), random_boxes(3, 0)).shape == (0, 3)
    assert len(suppress(np.zeros((0, 4)), np.zeros(0), 0.5)) == 0
