"""Calibration tokens on their way through a decoder, and what its linears read on it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.layer_carrier import LayerCarrier
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.precision import fast_products
from pipeline.model.structure import Layer
from pipeline.workers.workers import Done, Result, Workers


class MeasuredStream:
    """A `LayerStream` that workers may carry on.

    Args:
        model: a decoder, in evaluation mode.
        layers: its layers, as `decoder_structure` found them.
        tokens: int64 [N, T].
        workers: who runs the layers.
        batch_size: sequences that go through a layer at once.

    Attributes:
        tokens: how many there are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        tokens: torch.Tensor,
        workers: Workers,
        batch_size: int = 8,
    ) -> None:
        self.model, self.layers, self.tokens = model, layers, tokens.numel()
        self._stream = LayerStream(model, layers, tokens, batch_size)
        self._carrier = LayerCarrier.of(self._stream, workers)

    def advance(self, index: int, *, measure: bool = True) -> dict[str, Result[torch.Tensor]]:
        """Go through layer `index`; call with 0, 1, 2, ... in turn.

        Args:
            index: the layer.
            measure: whether what its groups read is wanted.

        Returns:
            Group name -> S = E[x x^T] of its input, float32 [n, n]; empty without `measure`.

        Raises:
            InputError: NaN or infinite activations; names the layer.
        """
        groups = self.layers[index].groups if measure else ()
        if self._carrier is not None:
            rows = self._carrier.advance_seeing(index, groups, torch.float32)
            return {
                group.name: self._carrier.input_moment(
                    group.name, group.in_features, rows[group.name]
                )
                for group in groups
            }
        with fast_products(self.model):
            moments = self._stream.advance(index, measure=measure)
        return {name: Done(moment.mean().float()) for name, moment in moments.items()}
