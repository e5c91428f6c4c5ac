"""The original model and the model as it is compressed, side by side at one layer.

A layer that is compressed should be fitted to what it will be given, and be told what the original
wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.hooks import not_finite, seeing_inputs, stopping_at
from pipeline.calibrate.layer_carrier import LayerCarrier
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.moments import Drift, SecondMoment
from pipeline.calibrate.precision import fast_products, quick_float32
from pipeline.model.structure import Layer, hidden_states_of
from pipeline.workers.workers import IN_PROCESS, Done, Result, Workers


class PairedStream:
    """Hidden states of all calibration tokens in both models, at the input of one layer.

    For each layer in turn: `enter` while it is still the original, then for each group
    in the order the layer runs them `measure` and replace it, then `leave`.

    Args:
        model: a decoder, in evaluation mode, whose layers are replaced one after the other.
        layers: its layers, as `decoder_structure` found them.
        tokens: int64 [N, T].
        batch_size: sequences that go through a layer at once.
        workers: who runs the layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        tokens: torch.Tensor,
        batch_size: int = 8,
        workers: Workers = IN_PROCESS,
    ) -> None:
        self.model, self.layers = model, layers
        self.original = LayerStream(model, layers, tokens, batch_size)
        self.compressed = [hidden.clone() for hidden in self.original.hidden]
        self._carrier = LayerCarrier.of(self.original, workers)
        self._inputs: dict[str, list[Result[torch.Tensor]]] = {}

    @torch.no_grad()
    def enter(self, index: int, *, measure: bool = True) -> None:
        """Carry the original's hidden states through layer `index`, and keep what its groups read.

        The inputs are kept in bfloat16: the moments are sums over thousands of tokens.
        """
        groups = self.layers[index].groups if measure else ()
        if self._carrier is not None:
            self._inputs = self._carrier.advance_seeing(index, groups, torch.bfloat16)
            return
        self._inputs = {group.name: [] for group in groups}

        def keep(name: str, inputs: torch.Tensor) -> None:
            self._inputs[name].append(Done(inputs.flatten(0, -2).bfloat16()))

        takers = {group.name: partial(keep, group.name) for group in groups}
        with seeing_inputs(self.model, takers), fast_products(self.model):
            self.original.advance(index, measure=False)

    @torch.no_grad()
    def measure(self, index: int, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments of a group's input x' in the compressed model, and of its distance from x.

        Returns:
            E[x' x'^T] and E[(x - x') x'^T], float32 [n, n].

        Raises:
            InputError: NaN or infinite activations; names the group.
        """
        originals = self._inputs.pop(group)
        if self._carrier is not None:
            rows = self._carrier.inputs_of(index, group, self.compressed)
            return self._carrier.moments(index, group, rows, originals)
        width = originals[0].get().shape[-1]
        seen, drift = SecondMoment(width), Drift(width)
        for original, x in zip(originals, self._inputs_of(index, group), strict=True):
            try:
                with quick_float32():
                    seen.add_(x)
                    drift.add_(original.get(), x)
            except ValueError as error:
                raise not_finite(group, error) from error
        return seen.mean().float(), drift.mean().float()

    @torch.no_grad()
    def leave(self, index: int) -> None:
        """Carry the compressed model's hidden states through layer `index`, as it is now."""
        if self._carrier is not None:
            self._carrier.run_(index, self.compressed)
            return
        with fast_products(self.model):
            self.original.run_(index, self.compressed)

    def through(self, index: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What layer `index` makes of some sequences as it is now, and what the original makes.

        Between `enter` and `leave`; with gradients by what the layer computes with.

        Args:
            index: of the layer.
            first: of the sequences.
            count: how many; all of one batch.

        Returns:
            Of the compressed model's hidden states, and of the original's, float32 [count, T, H].
        """
        place, start = divmod(first, self.original.batch_size)
        hidden, wanted = (
            batches[place][start : start + count]
            for batches in (self.compressed, self.original.hidden)
        )
        keywords = self.original.keywords_of(len(hidden))[index]
        with fast_products(self.model):
            found = hidden_states_of(self.original.modules[index](hidden, **keywords))
        return found.float(), wanted

    def _inputs_of(self, index: int, group: str) -> Iterator[torch.Tensor]:
        """What the group reads in the compressed model, batch by batch, float32 [tokens, n]."""
        module = self.original.modules[index]
        linear = self.model.get_submodule(group)
        for hidden in self.compressed:
            with stopping_at(linear) as caught, fast_products(self.model):
                module(hidden, **self.original.keywords[len(hidden)][index])
            (inputs,), _ = caught[0]
            yield inputs.flatten(0, -2).float()
