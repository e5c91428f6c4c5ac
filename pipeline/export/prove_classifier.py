"""An image classifier's twin: images in, logits out, of one and of several at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.export.contract import FLOAT16, LOGITS, PIXEL_VALUES
from pipeline.export.prove import Call
from pipeline.model.load import input_shape
from pipeline.quantize.cache_rounding import CacheRounding

_BATCHES = (1, 2)


class _ClassifierProver:
    """Every batch is a call of its own."""

    longest = 2  # there is no cache; the shortest that a request may ask for

    def require(self, config: PreTrainedConfig) -> None:
        """There is one call and no cache: what holds is seen."""

    def rounding_of(self, model: PreTrainedModel, length: int) -> CacheRounding:
        raise NotImplementedError("an image classifier has no cache")

    def calls_of_model(
        self, model: PreTrainedModel, length: int, rounding: CacheRounding | None = None
    ) -> list[Call]:
        calls = []
        for count in _BATCHES:
            pixels = torch.from_numpy(_images(model, count)).to(model.dtype)
            with torch.no_grad():
                logits = model(pixel_values=pixels).logits
            calls.append(Call(_words(count), logits.float().numpy()))
        return calls

    def calls_of_graph(self, session: Any, model: PreTrainedModel, length: int) -> list[Call]:
        half = session.get_inputs()[0].type == f"tensor({FLOAT16})"
        calls = []
        for count in _BATCHES:
            pixels = _images(model, count).astype(np.float16 if half else np.float32)
            (logits,) = session.run([LOGITS], {PIXEL_VALUES: pixels})
            calls.append(Call(_words(count), logits.astype(np.float32)))
        return calls


CLASSIFIER = _ClassifierProver()


def _words(count: int) -> str:
    return "an image" if count == 1 else f"{count} images at once"


def _images(model: PreTrainedModel, count: int) -> np.ndarray:
    shape = input_shape(model.config, type(model).__name__)
    images: np.ndarray = np.random.default_rng(count).standard_normal((count, *shape), np.float32)
    return images
