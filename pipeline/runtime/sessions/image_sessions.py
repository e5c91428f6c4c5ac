"""Image classifiers behind one interface: PyTorch, ONNX Runtime, TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.errors import InputError
from pipeline.export.contract import LOGITS
from pipeline.model.task import IMAGES
from pipeline.runtime.sessions.pixel_graphs import PixelEngine, PixelGraph

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ImageSession(Protocol):
    """A classifier that runs somewhere.

    Attributes:
        name: what the ledger calls it.
    """

    name: str

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Logits, float32 [B, classes], of pixel values, float32 [B, C, H, W]."""
        ...


class TorchImages:
    """A model in PyTorch.

    Args:
        model: in evaluation mode.
        name: what the ledger calls it.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Logits of a batch."""
        import torch

        with torch.no_grad():
            given = torch.from_numpy(pixels).to(self.model.device, self.model.dtype)
            logits = self.model(pixel_values=given).logits
        answer: np.ndarray = logits.float().cpu().numpy()
        return answer


class OnnxImages:
    """An export in ONNX Runtime on the CPU.

    Args:
        folder: what `skipcat export` wrote of an image classifier.
        name: what the ledger calls it.

    Raises:
        InputError: files missing, not matching each other, of another task, or not loadable.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from pipeline.export.record import read_export_record

        self.name = name
        self.record = read_export_record(folder, tasks=(IMAGES,))
        self._graph = PixelGraph(folder, self.record, {LOGITS: (self.record.classes,)})
        self.classify(np.zeros((1, *self.record.pixel_values), np.float32))

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Logits of a batch.

        Raises:
            InputError: images of another shape than the graph takes.
        """
        return self._graph.run(pixels)[LOGITS]


class EngineImages:
    """An engine in TensorRT.

    Args:
        folder: what `skipcat engine` wrote of an image classifier.
        name: what the ledger calls it.

    Raises:
        InputError: no GPU here, or the engine is not for this GPU, library or task.
        MissingPackageError: torch with CUDA, or the engine's TensorRT, is not installed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from pipeline.runtime.sessions.tensorrt_session import open_engine

        self.name = name
        opened = open_engine(folder)
        self.manifest = opened.manifest
        onnx = self.manifest["onnx"]
        if onnx.get("task") != IMAGES:
            raise InputError("This engine is of no image classifier.", where=folder)
        self._engine = PixelEngine(opened, {LOGITS: (onnx["classes"],)}, name)

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Logits of a batch; more images than the engine takes at once are run in pieces.

        Raises:
            InputError: images of another shape than the engine takes.
            ResourceError: TensorRT could not run the call.
        """
        return self._engine.run(pixels)[LOGITS]
