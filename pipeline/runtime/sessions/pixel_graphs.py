"""Graphs and engines from pixel values to named outputs, whatever these mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import InputError, ResourceError
from pipeline.export.contract import GRAPH_FILE, PIXEL_VALUES
from pipeline.runtime.sessions.graph_interface import (
    explained,
    require_image_graph,
    require_logits,
)

if TYPE_CHECKING:
    from pipeline.export.record import ExportRecord
    from pipeline.runtime.sessions.tensorrt_session import _OpenEngine


class PixelGraph:
    """An export in ONNX Runtime on the CPU.

    Args:
        folder: what `skipcat export` wrote.
        record: what it says of itself.
        returned: name of each output -> its shape without the batch.
        threads: threads within one operator; None leaves the choice to ONNX Runtime.
        optimised: let ONNX Runtime rewrite the graph.

    Raises:
        InputError: files missing, not matching each other, or not loadable.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(
        self,
        folder: Path,
        record: ExportRecord,
        returned: Mapping[str, tuple[int, ...]],
        threads: int | None = None,
        *,
        optimised: bool = True,
    ) -> None:
        from pipeline.runtime.sessions.onnx_graph import Graph

        self._path, self._record, self._returned = folder / GRAPH_FILE, record, dict(returned)
        self._graph = Graph.open(folder, record, threads, optimised=optimised)
        self._session = self._graph.session
        require_image_graph(self._session, record, returned, folder)

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of a batch, float32 [B, ...] each, of pixel values [B, C, H, W].

        Raises:
            InputError: images of another shape than the graph takes.
        """
        _require_shape(pixels, self._record.pixel_values, str(self._path))
        given = np.ascontiguousarray(pixels, dtype=self._record.dtype)
        with explained(self._path):
            found = self._session.run(list(self._returned), {PIXEL_VALUES: given})
        for values, shape in zip(found, self._returned.values(), strict=True):
            require_logits(values, (len(pixels), *shape), self._path)
        return {
            name: values.astype(np.float32)
            for name, values in zip(self._returned, found, strict=True)
        }


class PixelEngine:
    """An engine in TensorRT, in half precision.

    Args:
        opened: the engine.
        returned: name of each output -> its shape without the batch.
        name: what messages call it.
    """

    def __init__(
        self, opened: _OpenEngine, returned: Mapping[str, tuple[int, ...]], name: str
    ) -> None:
        self._opened, self._returned, self._name = opened, dict(returned), name
        self._stream = opened.torch.cuda.Stream()
        self._context = opened.make_context(0, self._stream.cuda_stream)

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs of a batch, float32 [B, ...] each; what is too large at once is run in pieces.

        Raises:
            InputError: images of another shape than the engine takes.
            ResourceError: TensorRT could not run the call.
        """
        manifest = self._opened.manifest
        most = manifest["limits"]["max_batch"]
        _require_shape(pixels, tuple(manifest["onnx"][PIXEL_VALUES]), self._name)
        parts = [self._run(pixels[i : i + most]) for i in range(0, len(pixels), most)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._returned}

    def _run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        torch: Any = self._opened.torch
        given = torch.from_numpy(np.ascontiguousarray(pixels)).to("cuda", torch.float16)
        found = {
            name: torch.empty((len(pixels), *shape), dtype=torch.float16, device="cuda")
            for name, shape in self._returned.items()
        }
        self._stream.wait_stream(torch.cuda.current_stream())
        self._context.set_input_shape(PIXEL_VALUES, tuple(given.shape))
        for name, tensor in {PIXEL_VALUES: given, **found}.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ResourceError("TensorRT could not run the engine.", where=self._name)
        self._stream.synchronize()
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def _require_shape(pixels: np.ndarray, shape: tuple[int, ...], where: str) -> None:
    """Raise InputError for pixel values [B, C, H, W] that are not of this [C, H, W]."""
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != tuple(shape):
        raise InputError(
            "The images are of another shape than the graph takes.",
            where=where,
            observed=str(pixels.shape),
            expected=str(("B", *shape)),
        )
