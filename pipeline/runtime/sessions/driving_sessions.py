"""Driving networks behind one interface: PyTorch, ONNX Runtime, TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.driving.evaluate import MapsOfBatch
from pipeline.driving.network import BOX_FIELDS
from pipeline.errors import InputError
from pipeline.export.contract import BOX_STRIDES, DRIVABLE, DRIVING_MAPS, LANE, PIXEL_VALUES
from pipeline.model.task import DRIVING
from pipeline.runtime.sessions.pixel_graphs import PixelEngine, PixelGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Anchors = Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True)
class _DrivingTraits:
    """What is needed to give a network images, and to read its maps.

    Attributes:
        size: height and width of its input.
        labels: what its boxes are of.
        anchors: sides in pixels, by stride and number.
    """

    size: tuple[int, int]
    labels: tuple[str, ...]
    anchors: Anchors

    @classmethod
    def of(cls, shape: Sequence[int], labels: Sequence[str], anchors: Anchors) -> _DrivingTraits:
        """By what the record of an export or an engine says."""
        return cls((shape[1], shape[2]), tuple(labels), anchors)

    @property
    def map_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of each map -> its shape without the batch."""
        (height, width), each = self.size, BOX_FIELDS + len(self.labels)
        boxes = [
            (len(level) * each, height // stride, width // stride)
            for level, stride in zip(self.anchors, BOX_STRIDES, strict=True)
        ]
        return dict(zip(DRIVING_MAPS, [*boxes, (1, *self.size), (1, *self.size)], strict=True))


class DrivingSession(Protocol):
    """A driving network that runs somewhere.

    Attributes:
        name: what the ledger calls it.
        traits: of the network.
    """

    name: str
    traits: _DrivingTraits

    def maps(self, pixels: np.ndarray) -> MapsOfBatch:
        """Maps of pixel values, float32 [B, 3, H, W] in [0, 1]."""
        ...


class TorchDriving:
    """A network in PyTorch.

    Args:
        model: in evaluation mode.
        name: what the ledger calls it.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        config = model.config
        height, width = config.image_size
        self.model, self.name = model, name
        self.traits = _DrivingTraits(
            (height, width), tuple(config.id2label.values()), config.anchors
        )

    def maps(self, pixels: np.ndarray) -> MapsOfBatch:
        """Maps of a batch."""
        import torch

        with torch.no_grad():
            given = torch.from_numpy(pixels).to(self.model.device, self.model.dtype)
            return MapsOfBatch.of(self.model(pixel_values=given))


class OnnxDriving:
    """An export in ONNX Runtime on the CPU.

    Args:
        folder: what `skipcat export` wrote of a driving network.
        name: what the ledger calls it.
        threads: threads within one operator; None leaves the choice to ONNX Runtime.
        optimised: let ONNX Runtime rewrite the graph; without, nodes run as they are written.

    Raises:
        InputError: files missing, not matching each other, of another task, or not loadable.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(
        self, folder: Path, name: str, threads: int | None = None, *, optimised: bool = True
    ) -> None:
        from pipeline.export.record import read_export_record

        self.name = name
        record = read_export_record(folder, tasks=(DRIVING,))
        self.traits = _DrivingTraits.of(record.pixel_values, record.labels, record.anchors)
        shapes = self.traits.map_shapes
        self._graph = PixelGraph(folder, record, shapes, threads, optimised=optimised)
        self.maps(np.zeros((1, *record.pixel_values), np.float32))

    def maps(self, pixels: np.ndarray) -> MapsOfBatch:
        """Maps of a batch.

        Raises:
            InputError: images of another shape than the graph takes.
        """
        return _maps(self._graph.run(pixels))


class EngineDriving:
    """An engine in TensorRT.

    Args:
        folder: what `skipcat engine` wrote of a driving network.
        name: what the ledger calls it.

    Raises:
        InputError: no GPU here, or the engine is not for this GPU, library or task.
        MissingPackageError: torch with CUDA, or the engine's TensorRT, is not installed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from pipeline.runtime.sessions.tensorrt_session import open_engine

        self.name = name
        opened = open_engine(folder)
        onnx = opened.manifest["onnx"]
        if onnx.get("task") != DRIVING:
            raise InputError("This engine is of no driving network.", where=folder)
        self.traits = _DrivingTraits.of(onnx[PIXEL_VALUES], onnx["labels"], onnx["anchors"])
        self._engine = PixelEngine(opened, self.traits.map_shapes, name)

    def maps(self, pixels: np.ndarray) -> MapsOfBatch:
        """Maps of a batch; more images than the engine takes at once are run in pieces.

        Raises:
            InputError: images of another shape than the engine takes.
            ResourceError: TensorRT could not run the call.
        """
        return _maps(self._engine.run(pixels))


def _maps(found: dict[str, np.ndarray]) -> MapsOfBatch:
    boxes = tuple(found[name] for name in DRIVING_MAPS[: len(BOX_STRIDES)])
    return MapsOfBatch(boxes, found[DRIVABLE], found[LANE])
