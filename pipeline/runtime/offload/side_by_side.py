"""Several calls of one model, layer after layer: each layer runs all of them before the next does.

All is transformers' code as it is, in calls of the shapes that one alone has. What a model gives
its layers beside the hidden states follows from positions alone, so it is found by running it with
layers that do nothing; and what comes behind the layers by running it with layers that are done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError
from pipeline.model.structure import hidden_states_of
from pipeline.runtime.offload.steady_attention import CallCache


@dataclass(frozen=True)
class ModelCall:
    """What is read in one call.

    Attributes:
        cache: of its rows.
        logits_to_keep: 0 for the logits of all rows, or the rows whose logits are wanted, int64.
    """

    cache: CallCache
    logits_to_keep: int | torch.Tensor = 0

    def keywords(self) -> dict[str, Any]:
        """Arguments of the model, but for the logits."""
        return {
            "input_ids": torch.from_numpy(self.cache.ids),
            "position_ids": torch.from_numpy(self.cache.positions).to(self.cache.device),
            "past_key_values": self.cache,
            "use_cache": True,
        }

    def run(self, model: PreTrainedModel) -> torch.Tensor:
        """Logits, [1, S, V] of the model's type, where it computes."""
        with torch.inference_mode(), self.cache.at_work():
            found = model(**self.keywords(), logits_to_keep=self.logits_to_keep)
        logits: torch.Tensor = found.logits
        return logits


def run_side_by_side(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    calls: Sequence[ModelCall],
    enter: Callable[[int], None],
    beside: tuple[Any, ...] | None,
) -> list[torch.Tensor]:
    """Logits of each call, [1, S, V] of the model's type, where it computes.

    Args:
        model: whose layers they are.
        layers: in their order.
        calls: of which a later one may go on where an earlier one ends.
        enter: called with a layer's number before it runs the first of them.
        beside: what layers return beside hidden states; None where these are no tuple's first.

    Raises:
        InputError: the layers are no chain.
    """
    given = [_given_to_layers(model, layers, call, beside) for call in calls]
    states = [own[0][0][0] for own in given]
    for number, layer in enumerate(layers):
        enter(number)
        for place, call in enumerate(calls):
            _, *rest = given[place][number][0]
            with torch.inference_mode(), call.cache.at_work():
                found = layer(states[place], *rest, **given[place][number][1])
            states[place] = hidden_states_of(found)
    return [
        _run_behind(model, layers, call, state, beside)
        for call, state in zip(calls, states, strict=True)
    ]


def _given_to_layers(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    call: ModelCall,
    beside: tuple[Any, ...] | None,
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of each layer: hidden states first, which are right for the first layer alone."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def pass_on(hidden_states: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        if seen and hidden_states is not seen[0][0][0]:
            raise InputError(
                "This model does something between its layers, so answers cannot share a pass.",
                where=type(model).__name__,
                observed=f"other hidden states before layer {len(seen)}",
                change="answer one at a time: --slots 1, or --batch-size 1",
            )
        seen.append(((hidden_states, *rest), keywords))
        return _as_returned(hidden_states, beside)

    with torch.inference_mode(), _replaced(layers, pass_on):
        model.base_model(**call.keywords())
    return seen


def _run_behind(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    call: ModelCall,
    state: torch.Tensor,
    beside: tuple[Any, ...] | None,
) -> torch.Tensor:
    """Norm and head, with the hidden states behind the last layer."""

    def give(hidden_states: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
        return _as_returned(state, beside)

    with _replaced(layers, give):
        return call.run(model)


def _as_returned(hidden: torch.Tensor, beside: tuple[Any, ...] | None) -> Any:
    """Hidden states in the form in which layers return them."""
    return hidden if beside is None else (hidden, *beside)


@contextlib.contextmanager
def _replaced(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Let the layers do something else inside."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
