"""Carry calibration tokens through a decoder one layer at a time.

Only the input of the current layer is held for all tokens, so the memory needed does not grow
with the depth of the model beyond its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.hooks import seeing_inputs, stopping_at, stopping_behind
from pipeline.calibrate.moments import SecondMoment
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
        groups = self.layers[index].groups if measure else ()
        moments = {group.name: SecondMoment(group.in_features) for group in groups}
        with seeing_inputs(self.model, {name: moment.add_ for name, moment in moments.items()}):
            self.run_(index, self.hidden)
        return moments

    @torch.no_grad()
    def run_(self, index: int, batches: Sequence[torch.Tensor]) -> None:
        """Run layer `index`, as it is now, on batches of hidden states, in their place."""
        for hidden in batches:
            keywords = self.keywords[len(hidden)][index]
            # In place: new tensors for every layer would scatter the heap, which then grows.
            hidden.copy_(hidden_states_of(self.modules[index](hidden, **keywords)))

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
