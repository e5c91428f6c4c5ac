"""Twins of models that look at images: images in, logits or maps out, of one and of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.export.contract import DRIVING_MAPS, FLOAT16, LOGITS, PIXEL_VALUES
from pipeline.export.prove import Call
from pipeline.model.load import input_shape
from pipeline.quantize.cache_rounding import CacheRounding

_BATCHES = (1, 2)
_Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class _ImageProver:
    """Every output of every batch is compared as a call of its own.

    Attributes:
        kind: of model, for messages.
        outputs: of the graph; by name, what its calls are of: `{}` stands for the images.
        of_model: the same of what the model returns, in that order.
        draw: images, float32, by a generator and their shape.
    """

    kind: str
    outputs: Mapping[str, str]
    of_model: Callable[[Any], tuple[torch.Tensor, ...]]
    draw: _Draw
    longest: int = 2  # there is no cache; the shortest that a request may ask for

    def require(self, config: PreTrainedConfig) -> None:
        """There is one call and no cache: what holds is seen."""

    def rounding_of(self, model: PreTrainedModel, length: int) -> CacheRounding:
        raise NotImplementedError(f"{self.kind} has no cache")

    def calls_of_model(
        self, model: PreTrainedModel, length: int, rounding: CacheRounding | None = None
    ) -> list[Call]:
        calls = []
        for count in _BATCHES:
            pixels = torch.from_numpy(self._images(model, count)).to(model.dtype)
            with torch.no_grad():
                found = self.of_model(model(pixel_values=pixels))
            calls += self._calls(count, [one.float().numpy() for one in found])
        return calls

    def calls_of_graph(self, session: Any, model: PreTrainedModel, length: int) -> list[Call]:
        half = session.get_inputs()[0].type == f"tensor({FLOAT16})"
        calls = []
        for count in _BATCHES:
            pixels = self._images(model, count).astype(np.float16 if half else np.float32)
            found = session.run(list(self.outputs), {PIXEL_VALUES: pixels})
            calls += self._calls(count, [one.astype(np.float32) for one in found])
        return calls

    def _images(self, model: PreTrainedModel, count: int) -> np.ndarray:
        shape = input_shape(model.config, type(model).__name__)
        return self.draw(np.random.default_rng(count), (count, *shape))

    def _calls(self, count: int, found: list[np.ndarray]) -> list[Call]:
        images = "an image" if count == 1 else f"{count} images at once"
        words = [text.format(images) for text in self.outputs.values()]
        return [Call(text, one) for text, one in zip(words, found, strict=True)]


CLASSIFIER = _ImageProver(
    "an image classifier",
    {LOGITS: "{}"},
    lambda output: (output.logits,),
    lambda rng, shape: rng.standard_normal(shape, np.float32),
)
DRIVING_NETWORK = _ImageProver(
    "a driving network",
    {name: f"{name} of {{}}" for name in DRIVING_MAPS},
    lambda output: (*output.boxes, output.drivable, output.lane),
    lambda rng, shape: rng.random(shape, np.float32),
)
