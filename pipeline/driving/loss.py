"""What training makes small: errors of boxes, of the drivable area and of lane lines.

A kind of label that an image lacks costs nothing there, whatever the network says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.driving.network import BOX_FIELDS, STRIDES, DrivingMaps

# An anchor fits a box whose sides differ from its own by less than this factor: (2 s)^2 < 4.
_MOST_RATIO = 4.0
# Small objects have the most cells, and so need the most weight in a mean over them.
_LEVEL_BALANCE = (4.0, 1.0, 0.4)
_BOX_GAIN, _OBJECT_GAIN, _CLASS_GAIN = 0.5, 5.0, 2.5
_MASK_GAIN = 2.0
_FOCUS = 2.0
# IoU is largest where pixels count as found above half of the IoU that is reached: about a quarter
# for lane lines. Weighed so, that is where the network says one half.
_LANE_WEIGHT = 4.0
_TVERSKY_MISSED, _TVERSKY_WRONG, _TVERSKY_POWER = 0.7, 0.3, 4 / 3


@dataclass(frozen=True)
class _Assigned:
    """Cells of one level that a box is expected of.

    Attributes:
        image: int64 [N], place in the batch.
        anchor: int64 [N].
        cell: int64 [N, 2], column and row.
        sides: float [N, 2] of the anchor, in cells.
        boxes: float [N, 4], what is expected there, in cells.
        classes: int64 [N].
    """

    image: torch.Tensor
    anchor: torch.Tensor
    cell: torch.Tensor
    sides: torch.Tensor
    boxes: torch.Tensor
    classes: torch.Tensor


def _assign(
    boxes: torch.Tensor,
    images: torch.Tensor,
    classes: torch.Tensor,
    sides: torch.Tensor,
    size: tuple[int, int],
) -> _Assigned:
    """Anchors by the ratio of sides; the cell of the centre and the two nearest beside it.

    A centre decodes to between -0.5 and 1.5 cells of its own, so that each of the three can say it.

    Args:
        boxes: float [M, 4], in cells of this level.
        images: int64 [M], place in the batch.
        classes: int64 [M].
        sides: float [A, 2] of the anchors, in cells.
        size: rows and columns of the level.
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    ratio = extent[:, None] / sides[None]
    fits = torch.maximum(ratio, 1 / ratio).amax(dim=2) < _MOST_RATIO
    which, anchor = fits.nonzero(as_tuple=True)
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2)[which]
    own = centre.floor()
    part = centre - own
    beside = torch.where(part < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(beside[:, :1])
    steps = (
        torch.zeros_like(own),
        torch.cat((beside[:, :1], zero), dim=1),
        torch.cat((zero, beside[:, 1:]), dim=1),
    )
    cell = torch.cat([own + step for step in steps]).long()
    which, anchor = which.repeat(3), anchor.repeat(3)
    limit = torch.tensor([size[1], size[0]], device=cell.device)
    inside = ((cell >= 0) & (cell < limit)).all(dim=1)
    which, anchor, cell = which[inside], anchor[inside], cell[inside]
    return _Assigned(images[which], anchor, cell, sides[anchor], boxes[which], classes[which])


@dataclass(frozen=True)
class Batch:
    """Images of a step, and what is known of them.

    Attributes:
        pixels: float [B, 3, H, W].
        boxes: float [M, 4], of all images, in pixels.
        images: int64 [M], the image of each box.
        classes: int64 [M].
        drivable: float [B, H, W], 0 or 1.
        lane: float [B, H, W], 0 or 1.
        known: bool [B, 3]: whether boxes, drivable area and lanes of an image are known.
    """

    pixels: torch.Tensor
    boxes: torch.Tensor
    images: torch.Tensor
    classes: torch.Tensor
    drivable: torch.Tensor
    lane: torch.Tensor
    known: torch.Tensor

    def to(self, device: str) -> Batch:
        """The same on a device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def driving_loss(
    maps: DrivingMaps, batch: Batch, anchors: list[list[list[float]]]
) -> dict[str, torch.Tensor]:
    """Losses by their names: `boxes`, `drivable`, `lane`; their sum is trained.

    Args:
        maps: of the network, for the batch.
        batch: the truth.
        anchors: of the network's config, in pixels.
    """
    assert maps.boxes is not None
    assert maps.drivable is not None
    assert maps.lane is not None
    drivable = _mask_loss(maps.drivable[:, 0], batch.drivable, batch.known[:, 1])
    lane = _mask_loss(maps.lane[:, 0], batch.lane, batch.known[:, 2], _LANE_WEIGHT)
    return {
        "boxes": _box_loss(maps.boxes, batch, anchors),
        "drivable": _MASK_GAIN * drivable,
        "lane": _MASK_GAIN * lane,
    }


def _mask_loss(
    logits: torch.Tensor, truth: torch.Tensor, known: torch.Tensor, weight: float = 1.0
) -> torch.Tensor:
    """Focal cross entropy, which looks at doubtful pixels, and focal Tversky, at thin areas.

    Focal loss is 1708.02002's with gamma 2, scaled by the part of a mask that is rarer; Tversky's
    index (1706.05721) minds what is missed (0.7) more than what is wrong (0.3).

    Args:
        logits: float [B, H, W].
        truth: float [B, H, W], 0 or 1.
        known: bool [B].
        weight: of pixels of the class, against others, in the cross entropy.
    """
    if not known.any():
        return logits.sum() * 0.0
    logits, truth = logits[known].float(), truth[known]
    p = logits.sigmoid()
    cross = F.binary_cross_entropy_with_logits(
        logits, truth, reduction="none", pos_weight=logits.new_tensor(weight)
    )
    right = p * truth + (1 - p) * (1 - truth)
    focal = ((1 - right).pow(_FOCUS) * cross).mean() / truth.mean().clamp(0.02, 0.5)
    hit = (p * truth).sum()
    missed, wrong = ((1 - p) * truth).sum(), (p * (1 - truth)).sum()
    index = (hit + 1) / (hit + _TVERSKY_MISSED * missed + _TVERSKY_WRONG * wrong + 1)
    return focal + (1 - index).clamp(min=1e-6).pow(1 / _TVERSKY_POWER)


def _box_loss(
    maps: tuple[torch.Tensor, ...], batch: Batch, anchors: list[list[list[float]]]
) -> torch.Tensor:
    """1 - CIoU where a box is expected, cross entropy of objectness (towards IoU) and class."""
    total = maps[0].sum() * 0.0
    known = batch.known[:, 0]
    if not known.any():
        return total
    counted = known[batch.images]
    boxes, images, classes = (x[counted] for x in (batch.boxes, batch.images, batch.classes))
    for raw, level, stride, balance in zip(maps, anchors, STRIDES, _LEVEL_BALANCE, strict=True):
        b, _, h, w = raw.shape
        grid = raw.float().view(b, len(level), -1, h, w)
        sides = torch.tensor(level, dtype=torch.float32, device=raw.device) / stride
        found = _assign(boxes / stride, images, classes, sides, (h, w))
        wanted = grid.new_zeros((b, len(level), h, w))
        if len(found.image):
            at = (found.image, found.anchor, slice(None), found.cell[:, 1], found.cell[:, 0])
            said = grid[at]
            placed = _place_boxes(said[:, :4], found.cell.float(), found.sides)
            iou, complete = _complete_iou(placed, found.boxes)
            total = total + _BOX_GAIN * (1 - complete).mean()
            target = iou.detach().clamp(min=0)
            cells = ((found.image * len(level) + found.anchor) * h + found.cell[:, 1]) * w
            # Where two boxes want one cell, the better one is what it should say: order-free.
            wanted.view(-1).scatter_reduce_(0, cells + found.cell[:, 0], target, "amax")
            if said.shape[1] > BOX_FIELDS:
                kinds = F.one_hot(found.classes, said.shape[1] - BOX_FIELDS).float()
                cross = F.binary_cross_entropy_with_logits(said[:, BOX_FIELDS:], kinds)
                total = total + _CLASS_GAIN * cross
        objects = F.binary_cross_entropy_with_logits(grid[known][:, :, 4], wanted[known])
        total = total + _OBJECT_GAIN * balance * objects
    return total


def _complete_iou(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU of pairs of boxes, and CIoU, which also minds distance and aspect ratio (1911.08287).

    Args:
        a: float [N, 4], as they are predicted.
        b: float [N, 4], as they should be.

    Returns:
        IoU and CIoU, float [N] each.
    """
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
    eps = 1e-7
    iou = shared / (size_a.prod(dim=1) + size_b.prod(dim=1) - shared + eps)
    around = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    apart = (a[:, :2] + a[:, 2:] - b[:, :2] - b[:, 2:]).square().sum(dim=1) / 4
    angle_a, angle_b = (torch.atan(s[:, 0] / (s[:, 1] + eps)) for s in (size_a, size_b))
    v = (angle_a - angle_b).square() * (4 / math.pi**2)
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return iou, iou - apart / (around.square().sum(dim=1) + eps) - alpha * v


def _place_boxes(raw: torch.Tensor, cells: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes out of four raw numbers each: centre 2 s - 0.5 + cell, sides (2 s)^2 anchor.

    Args:
        raw: float [N, 4], before the sigmoid s.
        cells: float [N, 2], column and row.
        anchors: float [N, 2], sides in cells.

    Returns:
        float [N, 4], x1, y1, x2, y2 in cells.
    """
    squashed = 2 * raw.sigmoid()
    centre = squashed[:, :2] - 0.5 + cells
    half = squashed[:, 2:].square() * anchors / 2
    return torch.cat((centre - half, centre + half), dim=1)
