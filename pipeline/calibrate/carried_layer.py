"""A decoder layer that is run where the model is not: tensors in, tensors out.

A worker is given the layer without its numbers (see `ModuleCode`), and those beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.calibrate.carried_module import ModuleCode
from pipeline.calibrate.hooks import not_finite, seeing_gradients, seeing_inputs, stopping_at
from pipeline.calibrate.moments import finite_rows
from pipeline.calibrate.precision import fast_products_of, quick_float32
from pipeline.calibrate.seen_rows import SeenRows
from pipeline.model.structure import Group, hidden_states_of

# Numbers that are held for each number that linears read or return: forward, and for the way back.
_FORWARD, _BACK = 1.5, 4.0
# Of libraries, and of a heap that keeps what is freed.
_SMALL_BYTES = 1 << 28
_CARRIED = (torch.Tensor, bool, int, float, str, type(None))


@dataclass(frozen=True)
class LayerCode:
    """A layer without its numbers.

    Attributes:
        module: the layer.
        dtype: that the model is held in.
        heads: of its queries.
    """

    module: ModuleCode
    dtype: torch.dtype
    heads: int

    @classmethod
    def of(cls, model: PreTrainedModel, name: str) -> LayerCode | None:
        """Of a layer as it is now; None where not every worker can make it."""
        module = ModuleCode.of(model, name)
        heads = model.config.get_text_config().num_attention_heads
        dtype = next(model.parameters()).dtype
        return None if module is None else cls(module, dtype, heads)

    def run(
        self, numbers: dict[str, torch.Tensor], keywords: dict[str, Any], hidden: torch.Tensor
    ) -> torch.Tensor:
        """What the layer makes of hidden states, float [B, T, H].

        Args:
            numbers: its parameters and buffers.
            keywords: what it is given beside the hidden states.
            hidden: float32 [B, T, H].
        """
        with fast_products_of(self.dtype):
            return hidden_states_of(self.module.call(numbers, hidden, **keywords))


def is_carried(value: Any) -> bool:
    """Whether what a layer is given beside hidden states can be given to it elsewhere."""
    if isinstance(value, Mapping):
        return all(map(is_carried, value.values()))
    return isinstance(value, _CARRIED) or (
        isinstance(value, (tuple, list)) and all(map(is_carried, value))
    )


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


# Of each task: the layer, its linears, its numbers, what it is given beside the hidden states, and
# those, float32 [B, T, H].
@torch.no_grad()
def layer_output(
    code: LayerCode,
    groups: Sequence[Group],
    numbers: dict[str, torch.Tensor],
    keywords: dict[str, Any],
    hidden: torch.Tensor,
) -> torch.Tensor:
    """What a layer makes of a batch, float32 [B, T, H]."""
    return code.run(numbers, keywords, hidden).to(hidden.dtype)


@torch.no_grad()
def layer_inputs(
    code: LayerCode,
    groups: Sequence[Group],
    numbers: dict[str, torch.Tensor],
    keywords: dict[str, Any],
    hidden: torch.Tensor,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """What a layer makes of a batch, and what each group reads, of this type [t, n].

    Raises:
        InputError: activations that are not finite; names the linear.
    """
    seen = {g.name: SeenRows(g.in_features, {}) for g in groups}
    takers = {name: rows.see_input for name, rows in seen.items()}
    with seeing_inputs(code.module.model(), takers):
        output = code.run(numbers, keywords, hidden).to(hidden.dtype)
    return [output, *(rows.inputs().to(dtype) for rows in seen.values())]


@torch.no_grad()
def linear_input(
    code: LayerCode,
    groups: Sequence[Group],
    numbers: dict[str, torch.Tensor],
    keywords: dict[str, Any],
    hidden: torch.Tensor,
    linear: str,
) -> torch.Tensor:
    """What one linear reads of a batch, float32 [t, n]; nothing behind it is run.

    Raises:
        InputError: activations that are not finite; names the linear.
    """
    with stopping_at(code.module.model().get_submodule(linear)) as caught:
        code.run(numbers, keywords, hidden)
    (inputs,), _ = caught[0]
    try:
        return finite_rows(inputs)
    except ValueError as error:
        raise not_finite(linear, error) from error


def layer_gradients(
    code: LayerCode,
    groups: Sequence[Group],
    numbers: dict[str, torch.Tensor],
    keywords: dict[str, Any],
    hidden: torch.Tensor,
    gradient: torch.Tensor,
) -> list[torch.Tensor]:
    """Carry a gradient, float32 [B, T, H], from a layer's output to its input.

    Returns:
        The gradient by its input, and then what `SeenRows.parts` has of each group.

    Raises:
        InputError: activations or gradients that are not finite; names the linear.
    """
    seen = {g.name: SeenRows(g.in_features, g.heights) for g in groups}
    hidden = hidden.clone().requires_grad_()
    with seeing_gradients(code.module.model(), seen):
        with torch.enable_grad():
            output = code.run(numbers, keywords, hidden)
        with quick_float32():
            (before,) = torch.autograd.grad(output, hidden, gradient.to(output.dtype))
    return [before, *(part for rows in seen.values() for part in rows.parts())]
