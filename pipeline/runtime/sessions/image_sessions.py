"""Image classifiers behind one interface: PyTorch, ONNX Runtime, TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.errors import InputError, ResourceError
from pipeline.export.contract import GRAPH_FILE, LOGITS, PIXEL_VALUES
from pipeline.model.task import IMAGES
from pipeline.runtime.sessions.graph_interface import (
    explained,
    require_image_graph,
    require_logits,
)

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
        from pipeline.runtime.sessions.onnx_session import Graph

        self.name, self._graph = name, folder / GRAPH_FILE
        self.record = read_export_record(folder, tasks=(IMAGES,))
        self._session, self._weights = Graph.open(folder, self.record, None)
        require_image_graph(self._session, self.record, folder)
        self.classify(np.zeros((1, *self.record.pixel_values), np.float32))

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Logits of a batch.

        Raises:
            InputError: images of another shape than the graph takes.
        """
        _require_shape(pixels, self.record.pixel_values, self.name)
        given = np.ascontiguousarray(pixels, dtype=self.record.dtype)
        with explained(self._graph):
            (logits,) = self._session.run([LOGITS], {PIXEL_VALUES: given})
        require_logits(logits, (len(pixels), self.record.classes), self._graph)
        answer: np.ndarray = logits.astype(np.float32)
        return answer


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
        self._opened = open_engine(folder)
        self.manifest, self._torch = self._opened.manifest, self._opened.torch
        if self.manifest["onnx"].get("task") != IMAGES:
            raise InputError("This engine takes no images.", where=folder)
        self._context = self._opened.make_context()
        self._stream = self._torch.cuda.Stream()

    def classify(self, pixels: np.ndarray) -> np.ndarray:
        """Logits of a batch; more images than the engine takes at once are run in pieces.

        Raises:
            InputError: images of another shape than the engine takes.
            ResourceError: TensorRT could not run the call.
        """
        onnx, most = self.manifest["onnx"], self.manifest["limits"]["max_batch"]
        _require_shape(pixels, tuple(onnx[PIXEL_VALUES]), self.name)
        parts = [self._run(pixels[i : i + most]) for i in range(0, len(pixels), most)]
        return np.concatenate(parts)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        torch: Any = self._torch
        given = torch.from_numpy(np.ascontiguousarray(pixels)).to("cuda", torch.float16)
        logits = torch.empty(
            (len(pixels), self.manifest["onnx"]["classes"]), dtype=torch.float16, device="cuda"
        )
        self._stream.wait_stream(torch.cuda.current_stream())
        self._context.set_input_shape(PIXEL_VALUES, tuple(given.shape))
        self._context.set_tensor_address(PIXEL_VALUES, given.data_ptr())
        self._context.set_tensor_address(LOGITS, logits.data_ptr())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ResourceError("TensorRT could not run the engine.", where=self.name)
        self._stream.synchronize()
        answer: np.ndarray = logits.float().cpu().numpy()
        return answer


def _require_shape(pixels: np.ndarray, shape: tuple[int, ...], where: str) -> None:
    """Raise InputError for pixel values [B, C, H, W] that are not of this [C, H, W]."""
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != tuple(shape):
        raise InputError(
            "The images are of another shape than the graph takes.",
            where=where,
            observed=str(pixels.shape),
            expected=str(("B", *shape)),
        )
