"""The original model's moments, for a fit of every layer to what it saw there."""

from __future__ import annotations

import torch

from pipeline.calibrate.measured_stream import MeasuredStream
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.model.structure import Layer
from pipeline.workers.workers import Result


class OneShotStream:
    """Moments of the original model: a layer's outputs are computed before it is replaced.

    Args:
        layers: of the model.
        stream: the text that nothing else has read; None where there is none.
        known: has the moments of the rest of it, if there is any.
        tokens: of that rest.
    """

    def __init__(
        self,
        layers: list[Layer],
        stream: MeasuredStream | None,
        known: LayerCosts | None,
        tokens: int,
    ) -> None:
        self.layers, self.stream, self.known, self.tokens = layers, stream, known, tokens
        self.moments: dict[str, Result[torch.Tensor]] = {}

    def enter(self, index: int, *, measure: bool = True) -> None:
        if self.stream is not None:
            self.moments = self.stream.advance(index, measure=measure)

    def measure(self, index: int, group: str) -> tuple[torch.Tensor, None]:
        seen = self.moments.get(group)
        known = None
        if self.known is not None:
            known = self.known.inputs_of(self.layers[index].name, group)
        if known is None:
            assert seen is not None, "text that nothing has read is in the stream"
            return seen.get(), None
        if seen is None or self.stream is None:
            return known, None
        # Mean of all tokens, of the means of both parts of them.
        tokens = self.stream.tokens
        mean = seen.get().double().mul_(tokens).add_(known, alpha=self.tokens)
        return mean.div_(tokens + self.tokens).float(), None

    def leave(self, index: int) -> None:
        self.moments = {}
