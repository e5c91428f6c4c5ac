"""Which cells and anchors of the maps are asked for which true box."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# An anchor fits a box whose sides differ from its own by less than this factor: (2 s)^2 < 4.
_MOST_RATIO = 4.0


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


def assign(
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
