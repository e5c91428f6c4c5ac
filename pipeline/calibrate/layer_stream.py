"""Carry calibration tokens through a decoder one layer at a time.

Only the input of the current layer is held for all tokens, so the memory needed does not grow
with the depth of the model beyond its weights. Side by side with the model as it is compressed: a
layer of that should be fitted to what it will be given, and be told what the original wanted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.hooks import not_finite, seeing_inputs, stopping_at, stopping_behind
from pipeline.calibrate.moments import SecondMoment
from pipeline.calibrate.precision import fast, fast_products
from pipeline.errors import InputError
from pipeline.model.structure import Layer, hidden_states_of


class LayerStream:
    """Hidden states of all calibration tokens, at the input of one layer.

    Args:
        model: a decoder, in evaluation mode.
        layers: its layers, as `decoder_structure` found them.
        tokens: int64 [N, T].
        batch_size: sequences that go through a layer at once.
    """

    def __init__(
        self, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, batch_size: int = 8
    ) -> None:
        self.model, self.layers, self.batch_size = model, layers, batch_size
        self.modules = [model.get_submodule(layer.name) for layer in layers]
        self.batches = list(tokens.split(batch_size))
        self._given_back = self._output_of_first()
        with torch.no_grad():
            self.hidden = [self._embed(batch) for batch in self.batches]
            self.keywords = {
                len(batch): self._layer_keywords(batch)
                for batch in {len(batch): batch for batch in self.batches}.values()
            }

    def keywords_of(self, count: int) -> list[dict[str, Any]]:
        """The arguments beside the hidden states that each layer is given for so many sequences."""
        if count not in self.keywords:
            with torch.no_grad():
                self.keywords[count] = self._layer_keywords(self.batches[0][:count])
        return self.keywords[count]

    @torch.no_grad()
    def advance(self, index: int, *, measure: bool = True) -> dict[str, SecondMoment]:
        """Run layer `index` on its inputs and keep its outputs in their place.

        Args:
            index: the layer to run; call with 0, 1, 2, ... in turn.
            measure: accumulate the second moment of every group's input.

        Returns:
            Group name -> its second moment; empty without `measure`.

        Raises:
            InputError: NaN or infinite activations; names the layer.
        """
        layer, module = self.layers[index], self.modules[index]
        moments = {group.name: SecondMoment(group.in_features) for group in layer.groups}
        takers = {name: moment.add_ for name, moment in moments.items()} if measure else {}
        with seeing_inputs(self.model, takers):
            for hidden in self.hidden:
                keywords = self.keywords[len(hidden)][index]
                # In place: new tensors for every layer would scatter the heap, which then grows.
                hidden.copy_(hidden_states_of(module(hidden, **keywords)))
        return moments if measure else {}

    def as_output(self, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which layers return them: alone, or first in a tuple."""
        if isinstance(self._given_back, tuple):
            return (hidden, *(None for _ in self._given_back[1:]))
        return hidden

    def _output_of_first(self) -> Any:
        """What the first layer returns for a few tokens."""
        with torch.no_grad(), stopping_behind(self.modules[0]) as caught:
            self.model(input_ids=self.batches[0][:1, :2], use_cache=False)
        return caught[0]

    def _embed(self, batch: torch.Tensor) -> torch.Tensor:
        """Input of the first layer, float32 [B, T, H], whatever the model is held in."""
        with stopping_at(self.modules[0]) as caught:
            self.model(input_ids=batch, use_cache=False)
        args, keywords = caught[0]
        return (args[0] if args else keywords["hidden_states"]).float()

    def _layer_keywords(self, batch: torch.Tensor) -> list[dict[str, Any]]:
        """The arguments beside the hidden states that the model gives each layer.

        They depend on positions and masks alone, so the layers are replaced by the identity.
        """
        seen: list[dict[str, Any]] = []

        def identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                raise InputError(
                    "A decoder layer takes positional arguments beside the hidden states.",
                    where=self.layers[len(seen)].name,
                )
            seen.append(kwargs)
            return self.as_output(hidden_states)

        with contextlib.ExitStack() as patches:
            for module in self.modules:
                patches.enter_context(patch.object(module, "forward", identity))
            self.model.base_model(input_ids=batch, use_cache=False)
        return seen


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
        self, model: PreTrainedModel, layers: list[Layer], tokens: torch.Tensor, batch_size: int = 8
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


def _keeping(kept: list[torch.Tensor]) -> Callable[[torch.Tensor], None]:
    return lambda inputs: kept.append(inputs.flatten(0, -2).bfloat16())
