"""What a decoder caches, found by running it: the modules whose outputs become keys and values.

Keys are rotated by their position before they are cached, and position 0 turns nothing: the module
that gives the keys is the last one whose output for the first token is the first key cached, up to
a factor. No list of architectures and no list of names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from pipeline.errors import InputError
from pipeline.model.structure import Layer

Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
# Tokens to probe with; other numbers than heads usually are, so that the axis of tokens is known.
_PROBE_TOKENS = 7
_SAME = 1e-4


@dataclass(frozen=True)
class CachedSide:
    """The keys or the values of one layer.

    Attributes:
        layer: name of the decoder layer.
        side: `key` or `value`.
        source: module whose output they are, before they are rotated by position.
        heads: key/value heads.
        width: of each.
        is_rotated: whether they are turned by their position before they are cached.
    """

    layer: str
    side: Side
    source: str
    heads: int
    width: int
    is_rotated: bool = False

    @property
    def numbers(self) -> int:
        """Numbers cached for a token."""
        return self.heads * self.width


class _Noting(DynamicCache):
    """A cache that notes what its layers are first given."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        self.given[layer_idx] = key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def cache_structure(model: PreTrainedModel, layers: list[Layer]) -> list[CachedSide]:
    """Run a few tokens and read off what every layer caches, keys before values.

    Args:
        model: a decoder in evaluation mode.
        layers: its layers.

    Raises:
        InputError: a layer caches something that no module of its own gives (fused projections, a
            latent already, windows that drop tokens); says which and what it looked for.
    """
    outputs: dict[str, list[tuple[str, torch.Tensor]]] = {layer.name: [] for layer in layers}
    cache = _Noting(model.config)
    tokens = torch.arange(1, 1 + _PROBE_TOKENS, device=model.device)[None]
    hooks = [
        module.register_forward_hook(_noting(outputs[layer.name], f"{layer.name}.{name}"))
        for layer in layers
        for name, module in model.get_submodule(layer.name).named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    if sorted(cache.given) != list(range(len(layers))):
        raise _unknown(model, "a cache for every layer", f"caches of layers {sorted(cache.given)}")
    return [
        _found(model, layer.name, side, states, outputs[layer.name])
        for number, layer in enumerate(layers)
        for side, states in zip(SIDES, cache.given[number], strict=True)
    ]


def _noting(outputs: list[tuple[str, torch.Tensor]], name: str) -> Any:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append((name, output))

    return note


def _found(
    model: PreTrainedModel,
    layer: str,
    side: Side,
    states: torch.Tensor,
    outputs: list[tuple[str, torch.Tensor]],
) -> CachedSide:
    """The last module that gave the states [1, heads, tokens, width], as they are at token 0."""
    _, heads, _, width = states.shape
    cached = states[0].transpose(0, 1).flatten(1).double()
    first = cached[0]
    for name, output in reversed(outputs):
        tokens = tokens_of(output, heads, width)
        if tokens is None or tokens.shape[1] != _PROBE_TOKENS:
            continue
        given = tokens[0].double()
        scale = given[0] @ first / (given[0] @ given[0]).clamp_min(1e-30)
        if side == "value":
            scale = scale.new_ones(())
        if _alike(scale * given[0], first):
            return CachedSide(layer, side, name, heads, width, not _alike(scale * given, cached))
    raise _unknown(model, f"a module of {layer} that gives its {side}s", "none does")


def _alike(given: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((given - wanted).norm()) <= _SAME * float(wanted.norm())


def tokens_of(output: torch.Tensor, heads: int, width: int) -> torch.Tensor | None:
    """What a module returns as [B, S, heads * width]; None where it is of another shape.

    Args:
        output: [B, S, heads * width], [B, S, heads, width] or [B, heads, S, width].
        heads: key/value heads.
        width: of each.
    """
    if output.dim() == 3 and output.shape[-1] == heads * width:
        return output
    if output.dim() == 4 and output.shape[-1] == width:
        if output.shape[2] == heads:
            return output.flatten(2)
        if output.shape[1] == heads:
            return output.transpose(1, 2).flatten(2)
    return None


def _unknown(model: PreTrainedModel, expected: str, observed: str) -> InputError:
    return InputError(
        "It is not known what this model caches, so its cache cannot be made smaller.",
        where=type(model).__name__,
        expected=expected,
        observed=observed,
        change="compress it without a budget for the cache",
    )
