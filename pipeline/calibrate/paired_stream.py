"""Calibration tokens through the original and the compressed model, side by side, layer by layer.

A layer of the compressed model should be fitted to what it will be given, and be told what the
original model wanted. Both need the layer's inputs in both models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.hooks import not_finite, seeing_inputs, stopping_at
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.moments import SecondMoment, rows_of
from pipeline.calibrate.precision import fast, fast_products
from pipeline.model.structure import Layer, hidden_states_of


class PairedStream:
    """Hidden states of all calibration tokens in both models, at the input of one layer.

    For each layer in turn: `enter` while it is still the original, then for each group
    in the order the layer runs them `measure` and replace it, then `leave`.

    Args:
        model: a decoder, in evaluation mode, whose layers are replaced one after the other.
        layers: its layers, as `decoder_structure` found them.
        tokens: int64 [N, T].
        batch_size: sequences that go through a layer at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[Layer],
        tokens: torch.Tensor,
        batch_size: int = 8,
    ) -> None:
        self.model, self.layers = model, layers
        self.original = LayerStream(model, layers, tokens, batch_size)
        self.compressed = [hidden.clone() for hidden in self.original.hidden]
        self.inputs: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def enter(self, index: int, *, measure: bool = True) -> None:
        """Carry the original's hidden states through layer `index`, and keep what its groups read.

        The inputs are kept in bfloat16: the moments are sums over thousands of tokens.
        """
        groups = self.layers[index].groups if measure else ()
        self.inputs = {group.name: [] for group in groups}
        takers = {name: _keeping(kept) for name, kept in self.inputs.items()}
        with seeing_inputs(self.model, takers), fast_products(self.model):
            self.original.advance(index, measure=False)

    @torch.no_grad()
    def measure(self, index: int, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Moments of a group's input x' in the compressed model, and of its distance from x.

        The distance is small beside x', so that its product may be taken in bfloat16.

        Returns:
            E[x' x'^T] and E[(x - x') x'^T], float64 [n, n].

        Raises:
            InputError: NaN or infinite activations; names the group.
        """
        width = self.inputs[group][0].shape[-1]
        seen, drift = SecondMoment(width), torch.zeros(width, width, dtype=torch.float64)
        for place, x in enumerate(self._inputs_of(index, group)):
            try:
                seen.add_(x)
            except ValueError as error:
                raise not_finite(group, error) from error
            distance = self.inputs[group][place].float() - x
            drift += fast(distance).T @ fast(x)
        del self.inputs[group]
        return seen.mean(), drift / seen.tokens

    @torch.no_grad()
    def leave(self, index: int) -> None:
        """Carry the compressed model's hidden states through layer `index`, as it is now."""
        module = self.original.modules[index]
        for hidden in self.compressed:
            keywords = self.original.keywords[len(hidden)][index]
            with fast_products(self.model):
                hidden.copy_(hidden_states_of(module(hidden, **keywords)))

    def _inputs_of(self, index: int, group: str) -> Iterator[torch.Tensor]:
        """What the group reads in the compressed model, batch by batch, float32 [tokens, n]."""
        module = self.original.modules[index]
        linear = self.model.get_submodule(group)
        for hidden in self.compressed:
            with stopping_at(linear) as caught, fast_products(self.model):
                module(hidden, **self.original.keywords[len(hidden)][index])
            yield rows_of(caught[0].args[0]).float()


def _keeping(kept: list[torch.Tensor]) -> Callable[[torch.Tensor], None]:
    return lambda inputs: kept.append(rows_of(inputs).bfloat16())
