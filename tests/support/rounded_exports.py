"""Graphs of small networks whose convolutions are rounded, as torch's exporter writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.checkpoint.install import install_
from pipeline.export.int8_nodes import int8_as_nodes
from tests.support.convolutions import SmallNet, images, rounded_small_net

__all__ = ["export_rounded", "rounded_network"]


def rounded_network(runtime: str, bits: int = 8) -> SmallNet:
    """A small network with kernels of so many bits, for a runtime."""
    model, entries, tensors = rounded_small_net(runtime, bits)
    install_(model, entries, tensors)
    return model


def export_rounded(model: SmallNet, path: Path) -> Path:
    """Write its graph; the input is `x`, of any batch."""
    with int8_as_nodes(model):
        program = torch.onnx.export(
            model,
            (images(1)[0],),
            dynamo=True,
            verify=False,
            opset_version=21,
            input_names=["x"],
            dynamic_shapes=({0: "batch"},),
        )
    assert program is not None
    program.save(path)
    return path
