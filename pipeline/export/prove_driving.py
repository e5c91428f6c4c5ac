"""A driving network's twin: images in, five maps out, of one and of several at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.export.contract import DRIVING_MAPS, FLOAT16, PIXEL_VALUES
from pipeline.export.prove import Call
from pipeline.model.load import input_shape
from pipeline.quantize.cache_rounding import CacheRounding

_BATCHES = (1, 2)


class _DrivingProver:
    """Every map of every batch is compared as a call of its own."""

    longest = 2  # there is no cache; the shortest that a request may ask for

    def require(self, config: PreTrainedConfig) -> None:
        """There is one call and no cache: what holds is seen."""

    def rounding_of(self, model: PreTrainedModel, length: int) -> CacheRounding:
        raise NotImplementedError("a driving network has no cache")

    def calls_of_model(
        self, model: PreTrainedModel, length: int, rounding: CacheRounding | None = None
    ) -> list[Call]:
        calls = []
        for count in _BATCHES:
            pixels = torch.from_numpy(_images(model, count)).to(model.dtype)
            with torch.no_grad():
                maps = model(pixel_values=pixels)
            found = (*maps.boxes, maps.drivable, maps.lane)
            calls += _calls(count, (one.float().numpy() for one in found))
        return calls

    def calls_of_graph(self, session: Any, model: PreTrainedModel, length: int) -> list[Call]:
        half = session.get_inputs()[0].type == f"tensor({FLOAT16})"
        calls = []
        for count in _BATCHES:
            pixels = _images(model, count).astype(np.float16 if half else np.float32)
            maps = session.run(list(DRIVING_MAPS), {PIXEL_VALUES: pixels})
            calls += _calls(count, (one.astype(np.float32) for one in maps))
        return calls


DRIVING_NETWORK = _DrivingProver()


def _calls(count: int, maps: Iterable[np.ndarray]) -> list[Call]:
    images = "an image" if count == 1 else f"{count} images at once"
    return [Call(f"{name} of {images}", m) for name, m in zip(DRIVING_MAPS, maps, strict=True)]


def _images(model: PreTrainedModel, count: int) -> np.ndarray:
    shape = input_shape(model.config, type(model).__name__)
    images: np.ndarray = np.random.default_rng(count).random((count, *shape), np.float32)
    return images
