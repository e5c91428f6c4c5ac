"""A network of convolutions and its images, whichever task it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from pipeline.errors import InputError
from pipeline.lazy import imported
from pipeline.model.source import Source
from pipeline.model.task import TASKS, Task, task_of_model


@dataclass(frozen=True)
class LabelledImages:
    """Images with labels, as the steps of a training read them.

    Attributes:
        read: of a step, by its number: pixel values [B, C, H, W], and what is known of them.
        held_out: the same of images that no step reads, batch by batch.
        loss: of a network's outputs for pixel values, and what is known of them: float [].
        described: what recipe.json says.
    """

    read: Callable[[int], tuple[torch.Tensor, Any]]
    held_out: Callable[[], Iterator[tuple[torch.Tensor, Any]]]
    loss: Callable[[Any, Any], torch.Tensor]
    described: dict[str, Any]


@dataclass(frozen=True)
class OpenedNetwork:
    """A network of convolutions, and what reads images for it.

    Attributes:
        model: in evaluation mode, float32.
        processor: saved with it.
        source: where it came from.
        task: as recipe.json writes it.
        read_batches: of (spec, images at most, seed): pixel values, and what recipe.json says.
    """

    model: PreTrainedModel
    processor: ImageProcessingMixin
    source: Source
    task: Task
    read_batches: Callable[[str, int, int], tuple[list[torch.Tensor], dict[str, Any]]]


def open_network(name: str) -> OpenedNetwork:
    """The network that a name stands for, by its task's row.

    Raises:
        InputError: a model for a task whose networks have no convolutions, or a broken one.
    """
    task = task_of_model(name)
    adapter = TASKS[task].adapters.get("convolutions")
    if adapter is None:
        raise InputError(
            "This takes a network of convolutions.",
            where=name,
            observed=TASKS[task].kind,
            expected=" or ".join(r.kind for r in TASKS.values() if "convolutions" in r.adapters),
        )
    opened: OpenedNetwork = imported(adapter)(name)
    return opened
