"""A decoder layer that is run where the model is not: tensors in, tensors out.

A worker makes the layer of the model's class and config, without numbers, and is given those.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from pipeline.calibrate.hooks import seeing_gradients
from pipeline.calibrate.precision import fast_products_of, quick_float32
from pipeline.calibrate.seen_rows import SeenRows
from pipeline.model.structure import Group, hidden_states_of

_OF_TRANSFORMERS = "transformers."
# Numbers that are held for each number that linears read or return: forward, and for the way back.
_FORWARD, _BACK = 1.5, 4.0
# Of libraries, and of a heap that keeps what is freed.
_SMALL_BYTES = 1 << 28
_CARRIED = (torch.Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True)
class LayerCode:
    """What a layer is made of but for its numbers.

    Attributes:
        architecture: class of the model, of transformers.
        config: of the model, as JSON.
        attention: how it computes attention.
        dtype: that the model is held in.
    """

    architecture: type[PreTrainedModel]
    config: str
    attention: str
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel, names: Sequence[str]) -> LayerCode | None:
        """Of a model's layers; None where class and config do not say all of them.

        So it is with code that is not of transformers, and with layers that were changed.
        """
        config, own = model.config, type(model)
        if not own.__module__.startswith(_OF_TRANSFORMERS) or model.device.type != "cpu":
            return None
        dtype = next(model.parameters()).dtype
        code = cls(own, config.to_json_string(), config._attn_implementation, dtype)
        same = all(
            _described(model.get_submodule(n)) == _described(code.empty().get_submodule(n))
            for n in names
        )
        return code if same else None

    def empty(self) -> PreTrainedModel:
        """The model without numbers."""
        kind: Any = self.architecture
        return _empty(kind, self.config, self.attention)


@functools.lru_cache(maxsize=1)
def _empty(architecture: Any, config: str, attention: str) -> PreTrainedModel:
    read = architecture.config_class.from_dict(json.loads(config))
    read._attn_implementation = attention
    with init_empty_weights():
        model: PreTrainedModel = architecture(read).eval()
    return model


def _described(layer: nn.Module) -> list[Any]:
    """What two layers that compute the same have in common."""
    numbers = [(name, tensor.shape) for name, tensor in numbers_of(layer).items()]
    modules = [(name, type(part)) for name, part in layer.named_modules()]
    patched = [name for name, part in layer.named_modules() if "forward" in vars(part)]
    return [numbers, modules, patched]


def numbers_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, by name."""
    named = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def is_carried(value: Any) -> bool:
    """Whether what a layer is given beside hidden states can be given to it elsewhere."""
    if isinstance(value, Mapping):
        return all(map(is_carried, value.values()))
    return isinstance(value, _CARRIED) or (
        isinstance(value, (tuple, list)) and all(map(is_carried, value))
    )


def attention_heads(model: PreTrainedModel) -> int:
    """How many there are, of queries."""
    heads: int = model.config.get_text_config().num_attention_heads
    return heads


def layer_bytes(
    groups: Sequence[Group], shape: Sequence[int], heads: int, *, back: bool = False
) -> int:
    """Memory that a layer takes for a batch beside what it is given, about.

    Args:
        groups: its linears.
        shape: of the batch, B, T, H.
        heads: of queries.
        back: whether a gradient is carried back, and what the linears saw is returned.
    """
    sequences, length, width = shape
    numbers = sum(group.in_features + sum(group.out_features) for group in groups)
    a_token = (_BACK if back else _FORWARD) * numbers + 2 * heads * length + 4 * width
    return int(4 * sequences * length * a_token) + _SMALL_BYTES


def layer_output(
    code: LayerCode,
    name: str,
    groups: Sequence[Group],
    numbers: dict[str, torch.Tensor],
    keywords: dict[str, Any],
    hidden: torch.Tensor,
) -> torch.Tensor:
    """What a layer makes of a batch of hidden states, float32 [B, T, H].

    Args:
        code: of the layer.
        name: of it.
        groups: its linears, of which nothing but their sizes is wanted, for what is declared.
        numbers: its parameters and buffers.
        keywords: what it is given beside the hidden states.
        hidden: float32 [B, T, H].
    """
    layer = code.empty().get_submodule(name)
    with torch.no_grad(), fast_products_of(code.dtype):
        output = functional_call(layer, numbers, (hidden,), keywords)
        return hidden_states_of(output).to(hidden.dtype)


def layer_gradients(
    code: LayerCode,
    name: str,
    groups: Sequence[Group],
    numbers: dict[str, torch.Tensor],
    keywords: dict[str, Any],
    hidden: torch.Tensor,
    gradient: torch.Tensor,
) -> list[torch.Tensor]:
    """Carry a gradient from a layer's output to its input, and show what its linears saw.

    Args:
        code: of the layer.
        name: of it.
        groups: its linears.
        numbers: its parameters and buffers.
        keywords: what it is given beside the hidden states.
        hidden: float32 [B, T, H].
        gradient: by its output, float32 [B, T, H].

    Returns:
        The gradient by its input, and then what `SeenRows.parts` has of each group.

    Raises:
        InputError: activations or gradients that are not finite; names the linear.
    """
    model = code.empty()
    seen = {
        g.name: SeenRows(g.in_features, dict(zip(g.members, g.out_features, strict=True)))
        for g in groups
    }
    hidden = hidden.clone().requires_grad_()
    with seeing_gradients(model, seen):
        with torch.enable_grad(), fast_products_of(code.dtype):
            found = functional_call(model.get_submodule(name), numbers, (hidden,), keywords)
            output = hidden_states_of(found)
        with quick_float32():
            (before,) = torch.autograd.grad(output, hidden, gradient.to(output.dtype))
    return [before, *(part for rows in seen.values() for part in rows.parts())]
