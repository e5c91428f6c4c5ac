"""The graph of a driving network, through torch's own exporter: images in, undecoded maps out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.skeleton import Skeleton, StoredMatrix
from pipeline.errors import UsageError
from pipeline.export.contract import DRIVING_MAPS, FLOAT, PIXEL_VALUES
from pipeline.export.int8_nodes import require_int8_runtime
from pipeline.export.request import ExportRequest
from pipeline.export.tracing import Traced, traced_graph
from pipeline.model.load import input_shape, load_processor
from pipeline.model.task import DRIVING

# More than one, and no number that a dimension of the network is likely to have.
_TRACE_BATCH = 3


class _Maps(nn.Module):
    """Pixel values in, five maps out; one decoder outside makes boxes for all runtimes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps of pixel values [B, C, H, W], in the order of DRIVING_MAPS."""
        maps = self.model(pixel_values=pixel_values)
        return (*maps.boxes, maps.drivable, maps.lane)


@dataclass(frozen=True)
class _ScaledMatrix(StoredMatrix):
    """The weight of a convolution, with what normalises its outputs multiplied in.

    Attributes:
        scale: float32 [m], of each output.
    """

    scale: torch.Tensor

    def read(self) -> torch.Tensor:
        weight = super().read()
        return (weight.float() * self.scale[:, None, None, None]).to(self.dtype)


def trace_driving(skeleton: Skeleton, request: ExportRequest) -> Traced:
    """Export a driving network with a dynamic batch.

    Args:
        skeleton: the network without its matrices; its dtype becomes that of the graph.
        request: which operators.

    Raises:
        InputError: the exporter cannot handle the network, or its folder has no processor.
        UsageError: weights of few bits, which are for products with matrices.
    """
    if request.weights not in (None, FLOAT):
        raise UsageError(
            "A network of convolutions has no matrices that an export would round.",
            where="--weights",
            observed=request.weights,
            change="leave --weights out",
        )
    model = skeleton.model
    require_int8_runtime(model, request.traits.formats_of, skeleton.folder)
    _fold_norms_(skeleton)
    shape = input_shape(model.config, str(skeleton.folder))
    graph = traced_graph(
        skeleton,
        _Maps(model),
        (torch.zeros(_TRACE_BATCH, *shape, dtype=model.dtype),),
        rehearse=False,
        opset_version=request.traits.opset,
        dynamic_shapes={PIXEL_VALUES: {0: "batch_size"}},
        input_names=[PIXEL_VALUES],
        output_names=list(DRIVING_MAPS),
    )
    labels = model.config.id2label
    record: dict[str, Any] = {
        "task": DRIVING,
        PIXEL_VALUES: list(shape),
        "labels": [labels[number] for number in sorted(labels)],
        "anchors": model.config.anchors,
    }

    def write_files(folder: Path) -> None:
        load_processor(str(skeleton.folder)).save_pretrained(folder)

    return Traced(graph, record, write_files)


def _fold_norms_(skeleton: Skeleton) -> None:
    """Make of every convolution and its batch normalisation one convolution with a bias.

    y = (W x - mean) gamma / sqrt(var + eps) + beta. Every runtime does so by itself, and torch's
    exporter, too, which here would multiply stand-ins.
    """
    for name, pair in skeleton.model.named_modules():
        if not isinstance(pair, nn.Sequential) or len(pair) < 2:
            continue
        convolution, norm = pair[0], pair[1]
        if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
        shift = norm.bias.float() - norm.running_mean.float() * scale
        stored = skeleton.matrices[f"{name}.0.weight"]
        skeleton.matrices[f"{name}.0.weight"] = _ScaledMatrix(
            stored.file, stored.name, stored.shape, stored.dtype, scale.detach()
        )
        convolution.bias = nn.Parameter(shift.to(stored.dtype), requires_grad=False)
        pair[1] = nn.Identity()
