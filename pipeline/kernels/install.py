"""Factored layers that call the operator: one call for all layers that share a latent."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from pipeline.checkpoint.modeling_cache import hook_cache_maps
from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.kernels.op import block_skip_linear


class _BlockSkipGroup(nn.Module):
    """Linear layers of one latent: y = block_skip_linear(x), split among its members.

    Members are called one after the other with the same tensor; the first call computes for all.

    Args:
        layers: factored, in the form "skip", all of one owner; the first need not be the owner.
    """

    a: torch.Tensor
    b: torch.Tensor
    index: torch.Tensor

    def __init__(self, layers: list[FactoredLinear]) -> None:
        super().__init__()
        owner = layers[0].owner
        self.widths = [layer.out_features for layer in layers]
        with torch.no_grad():
            self.register_buffer("a", owner.down.weight.T.contiguous())
            stacked = torch.cat([layer.up.weight for layer in layers])
            self.register_buffer("b", stacked.T.contiguous())
        self.register_buffer("index", owner.permutation)
        self._given: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """What member `place` answers, [..., n] to [..., m of that member]."""
        if self._given is not x or place not in self._parts:
            y = block_skip_linear(x, self.a, self.b, self.index)
            self._parts = dict(enumerate(y.split(self.widths, dim=-1)))
            self._given = x
        part = self._parts.pop(place)
        if not self._parts:
            self._given = None
        return part


class _BlockSkipMember(nn.Module):
    """One layer of a group, in place of the factored layer it was."""

    def __init__(self, group: _BlockSkipGroup, place: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        # The first member registers the group with the model; the others only refer to it.
        self.group = group if place == 0 else None
        self._group = [group]
        self.place = place
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y, [..., n] to [..., m]."""
        y = self._group[0].part(self.place, x)
        return y if self.bias is None else y + self.bias


def use_operator_(model: nn.Module) -> int:
    """Replace every factored layer in skip form by a member of a group that calls the operator.

    The factors are stored transposed, as the kernels read them, and the old ones are let go.

    Args:
        model: changed in place; only for inference.

    Returns:
        How many layers were replaced.
    """
    groups: dict[FactoredLinear, list[tuple[str, FactoredLinear]]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear) and module.form == "skip":
            groups[module.owner].append((name, module))
    for members in groups.values():
        group = _BlockSkipGroup([layer for _, layer in members])
        for place, (name, layer) in enumerate(members):
            model.set_submodule(name, _BlockSkipMember(group, place, layer.up.bias))
    hook_cache_maps(model)
    return sum(map(len, groups.values()))
