"""The graph of an image classifier, through torch's own exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.skeleton import Skeleton
from pipeline.export.attention import active
from pipeline.export.contract import LOGITS, PIXEL_VALUES, Profile
from pipeline.export.request import ExportRequest
from pipeline.export.tracing import Traced, traced_graph
from pipeline.model.load import input_shape, load_processor
from pipeline.model.task import IMAGES

# More than one, and no number that a dimension of the model is likely to have.
_TRACE_BATCH = 3


class _Classify(nn.Module):
    """Pixel values in, logits out."""

    def __init__(self, model: PreTrainedModel, profile: Profile) -> None:
        super().__init__()
        self.model, self.profile = model, profile

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] of pixel values [B, C, H, W]."""
        active.set((self.profile, None))
        return self.model(pixel_values=pixel_values).logits


def trace_classifier(skeleton: Skeleton, request: ExportRequest) -> Traced:
    """Export a classifier with a dynamic batch.

    Args:
        skeleton: the model without its matrices; its dtype becomes that of the graph.
        request: which operators.

    Raises:
        InputError: the exporter cannot handle the model, or its folder does not say what images it
            takes.
    """
    model = skeleton.model
    shape = input_shape(model.config, str(skeleton.folder))
    graph = traced_graph(
        skeleton,
        _Classify(model, request.traits),
        (torch.zeros(_TRACE_BATCH, *shape, dtype=model.dtype),),
        rehearse=True,  # a Swin settles the sizes of its windows in its first call
        opset_version=request.traits.opset,
        dynamic_shapes={PIXEL_VALUES: {0: "batch_size"}},
        input_names=[PIXEL_VALUES],
        output_names=[LOGITS],
    )
    record: dict[str, Any] = {
        "task": IMAGES,
        PIXEL_VALUES: list(shape),
        "classes": int(graph.graph.outputs[0].shape[-1]),
    }

    def write_files(folder: Path) -> None:
        load_processor(str(skeleton.folder)).save_pretrained(folder)

    return Traced(graph, record, write_files)
