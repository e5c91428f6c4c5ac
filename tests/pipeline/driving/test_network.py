"""The network, its assignment and its losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from pipeline.driving.letterbox import Letterbox
from pipeline.driving.loss import Batch, _assign, _mask_loss, driving_loss
from pipeline.driving.network import STRIDES, QyolopConfig, QyolopForDrivingPerception
from pipeline.driving.perceive import _decode_boxes, perceive
from pipeline.driving.preprocess import QyolopImageProcessor
from pipeline.errors import InputError

SIZE = (64, 96)


@pytest.fixture(scope="module")
def model() -> QyolopForDrivingPerception:
    torch.manual_seed(0)
    return QyolopForDrivingPerception(QyolopConfig(SIZE, 4)).eval()


def truth(boxes: list[list[float]], known: list[list[bool]]) -> Batch:
    count = len(known)
    area = torch.zeros(count, *SIZE)
    area[:, 40:] = 1
    return Batch(
        torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(0)),
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.zeros(len(boxes), dtype=torch.int64),
        torch.zeros(len(boxes), dtype=torch.int64),
        area,
        area,
        torch.tensor(known),
    )


def total(model: QyolopForDrivingPerception, batch: Batch) -> torch.Tensor:
    losses = driving_loss(model(batch.pixels), batch, model.config.anchors)
    return torch.stack(list(losses.values())).sum()


def test_the_default_network_has_at_most_a_million_parameters() -> None:
    whole = QyolopForDrivingPerception(QyolopConfig())
    assert sum(parameter.numel() for parameter in whole.parameters()) <= 1_000_000


def test_maps_have_the_sizes_of_their_strides(model: QyolopForDrivingPerception) -> None:
    maps = model(pixel_values=torch.zeros(2, 3, *SIZE))
    assert [m.shape for m in maps.boxes] == [(2, 18, 64 // s, 96 // s) for s in STRIDES]
    assert maps.drivable.shape == maps.lane.shape == (2, 1, *SIZE)


def test_a_folder_gives_the_same_network_and_processor(
    model: QyolopForDrivingPerception, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    QyolopImageProcessor.for_size(SIZE).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModel.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    pixels = AutoImageProcessor.from_pretrained(tmp_path)([image])["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).lane, model(pixels).lane, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [{"image_size": (64, 100)}, {"width": 0}, {"anchors": (((3, 4),) * 3,) * 2},
     {"anchors": (((3, 0),) * 3,) * 3}],
)  # fmt: skip
def test_numbers_that_make_no_network_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        QyolopForDrivingPerception(QyolopConfig(**wrong))


def test_every_assigned_cell_can_say_its_box() -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 9, (30, 2))
    boxes = torch.tensor(np.concatenate((corner, corner + rng.uniform(0.5, 3, (30, 2))), 1))
    sides = torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    found = _assign(
        boxes.float(), torch.arange(30), torch.zeros(30, dtype=torch.int64), sides, (12, 12)
    )
    centre = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    away = centre - found.cell
    assert ((away >= -0.5) & (away <= 1.5)).all()
    ratio = (found.boxes[:, 2:] - found.boxes[:, :2]) / found.sides
    assert ((ratio < 4) & (ratio > 0.25)).all()
    own = (centre.floor() == found.cell).all(dim=1)
    assert set(found.image[own].tolist()) == set(range(30))


def test_what_is_not_known_costs_nothing(model: QyolopForDrivingPerception) -> None:
    batch = truth([[10, 10, 30, 30]], [[False, False, False]])
    losses = driving_loss(model(batch.pixels), batch, model.config.anchors)
    assert {name: float(loss.detach()) for name, loss in losses.items()} == {
        "boxes": 0.0, "drivable": 0.0, "lane": 0.0,
    }  # fmt: skip


def test_an_image_without_labels_does_not_change_the_loss_of_the_others(
    model: QyolopForDrivingPerception,
) -> None:
    whole = truth([[10, 10, 30, 30]], [[True] * 3])
    more = truth([[10, 10, 30, 30]], [[True] * 3, [False] * 3])
    pixels = torch.cat((whole.pixels, torch.rand(1, 3, *SIZE)))
    with torch.no_grad():
        alone = driving_loss(model(whole.pixels), whole, model.config.anchors)
        beside = driving_loss(model(pixels), more, model.config.anchors)
    for name in alone:
        torch.testing.assert_close(alone[name], beside[name], rtol=1e-4, atol=1e-6)


def test_gradients_reach_every_weight_and_the_box_loss_is_no_constant() -> None:
    torch.manual_seed(0)
    model = QyolopForDrivingPerception(QyolopConfig(SIZE, 4))
    boxes = [[10.0, 10, 22, 20], [30.0, 20, 60, 45], [5.0, 5, 90, 60]]
    batch = truth(boxes, [[True] * 3])
    total(model, batch).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The last unit of a head whose final weights are small may be dead; none is unreachable.
    assert [name for name in without if name.endswith("0.weight")] == []
    head = model.get_parameter("box_heads.1.1.bias").grad
    assert head is not None
    head = head.view(3, -1)
    assert head[:, :4].abs().sum() > 0


def test_a_few_steps_learn_one_image() -> None:
    torch.manual_seed(0)
    model = QyolopForDrivingPerception(QyolopConfig(SIZE, 4)).train()
    batch = truth([[20, 12, 44, 30]], [[True] * 3])
    batch.pixels[:, 0] = batch.drivable
    batch.pixels[:, 1, 12:30, 20:44] = 4
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        loss = total(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # in training mode: the running means are not there yet
        maps = model(batch.pixels)
    seen = perceive(
        tuple(m[0].numpy() for m in maps.boxes), maps.drivable[0].numpy(), maps.lane[0].numpy(),
        model.config.anchors, Letterbox.of(SIZE, SIZE),
    )  # fmt: skip
    assert (seen.drivable == batch.drivable[0].bool().numpy()).mean() > 0.95
    np.testing.assert_allclose(seen.boxes[0], [20, 12, 44, 30], atol=4)


def test_mask_loss_is_least_where_the_mask_is_right() -> None:
    area = torch.zeros(1, 8, 8)
    area[:, 3:5] = 1
    known = torch.tensor([True])
    losses = [float(_mask_loss(20 * s * (area - 0.5), area, known)) for s in (1.0, 0.1, -1.0)]
    assert losses[0] < 0.01 < losses[1] < losses[2]


def test_decoding_is_the_inverse_of_what_training_asks_for() -> None:
    """Maps that say a box in the terms of the loss are decoded, in NumPy, to that box."""
    anchors = QyolopConfig().anchors
    level, row, column, kind = 1, 2, 3, 0
    box = np.array([40.0, 30, 70, 50])
    maps = [np.full((18, 64 // s, 96 // s), -30.0, np.float32) for s in STRIDES]
    centre, size = (box[:2] + box[2:]) / 2 / 16, box[2:] - box[:2]
    wanted = np.concatenate(
        ((centre - [column, row] + 0.5) / 2, np.sqrt(size / np.array(anchors[level][kind])) / 2)
    )
    maps[level][:4, row, column] = np.log(wanted / (1 - wanted))
    maps[level][4:6, row, column] = 30
    boxes, scores, classes = _decode_boxes(tuple(maps), anchors, 0.25)
    np.testing.assert_allclose(boxes, [box], rtol=1e-5)
    assert scores.tolist() == pytest.approx([1.0])
    assert classes.tolist() == [0]
