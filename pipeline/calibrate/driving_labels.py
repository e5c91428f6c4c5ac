"""Labelled driving images as a loss, step by step: what the recipe's stage `finetune` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.calibrate.network import LabelledImages
from pipeline.driving.augment import batch_of, laid
from pipeline.driving.loss import Batch, driving_loss
from pipeline.driving.network import DrivingMaps, QyolopConfig
from pipeline.driving.recipe import FIRST, TrainRequest
from pipeline.driving.sample import some_places
from pipeline.driving.steps import drawn_batch
from pipeline.driving.train import open_sets

_HELD_OUT = 64


def open_labelled(
    config: QyolopConfig, spec: str, *, batch_size: int, seed: int, device: str, work: Path
) -> LabelledImages:
    """Open a labelled set for steps that read what `skipcat train --stage finetune` reads.

    Args:
        config: of the network that is trained.
        spec: as `skipcat train --data` takes it.
        batch_size: images of a step.
        seed: of their order and augmentation.
        device: of torch, that batches are put on.
        work: scenes are drawn into it.

    Raises:
        PipelineError: no such set, a broken one, or one without images to train or to hold out.
    """
    height, width = config.image_size
    request = TrainRequest(
        "finetune", spec, batch_size=batch_size, size=(height, width), scored=_HELD_OUT, seed=seed,
        device=device,
    )  # fmt: skip
    sets = open_sets(request, work)[FIRST]
    (stage,) = request.stages
    held_out = some_places(sets["val"], _HELD_OUT)

    def read(step: int) -> tuple[torch.Tensor, Batch]:
        batch = drawn_batch(stage, [sets["train"]], request, step)
        return batch.pixels, batch

    def read_held_out() -> Iterator[tuple[torch.Tensor, Batch]]:
        for first in range(0, len(held_out), batch_size):
            places = held_out[first : first + batch_size]
            samples = [laid(sets["val"].read(place), request.size) for place in places]
            batch = batch_of(samples).to(device)
            yield batch.pixels, batch

    def loss(maps: DrivingMaps, batch: Batch) -> torch.Tensor:
        return torch.stack(list(driving_loss(maps, batch, config.anchors).values())).sum()

    described: dict[str, Any] = {
        "source": Path(spec).name if Path(spec.partition(":")[0]).exists() else spec,
        "images": len(sets["train"]),
        "left_out": sets["train"].complaints.lines(),
        "sha256": hashlib.sha256("\n".join(sets["train"].names).encode()).hexdigest(),
    }
    return LabelledImages(read, read_held_out, loss, described)
