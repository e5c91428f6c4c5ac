"""Which norm feeds which linear, and what a norm does, both found by running them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.model.structure import probe_logits

_PROBES = 4
# Of the largest number: a norm in float32 rounds about so.
_SAME = 1e-5


def norms_before(model: PreTrainedModel, linears: Iterable[str]) -> dict[str, str]:
    """Linear -> the module with a gain, one number a channel, whose output it reads.

    Args:
        model: a decoder in evaluation mode; run on a few tokens.
        linears: dotted names; those that read anything else are left out.
    """
    returned: dict[tuple[Any, ...], str] = {}
    read: dict[str, str] = {}
    kept: list[torch.Tensor] = []  # alive, so that their places in memory stay theirs

    def gave(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                kept.append(output)
                returned[_place(output)] = name

        return hook

    def reads(name: str) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            if _place(args[0]) in returned:
                read[name] = returned[_place(args[0])]

        return hook

    hooks = [
        module.register_forward_hook(gave(name))
        for name, module in model.named_modules()
        if has_gain_alone(module)
    ]
    for name in linears:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(reads(name)))
    try:
        probe_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    return read


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The same of a tensor and of a view of all of it, as a head is given."""
    return tensor.data_ptr(), tensor.shape


def has_gain_alone(module: nn.Module) -> bool:
    """Whether a module's weight is a vector."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1


@torch.no_grad()
def neutral_gain(norm: nn.Module) -> float | None:
    """The weight with which a norm is y = x / rms(x): 1, or 0 where it multiplies by 1 + w.

    Args:
        norm: a module with a vector of weights; run on random numbers, as it was afterwards.

    Returns:
        None for a norm that does anything else: one that subtracts a mean, or adds a bias.
    """
    weight = norm.weight
    if len(list(norm.parameters(recurse=False))) != 1:
        return None
    assert isinstance(weight, nn.Parameter)
    generator = torch.Generator().manual_seed(0)
    probe = 3 * torch.randn(_PROBES, len(weight), generator=generator) + 1
    wanted = probe / probe.square().mean(-1, keepdim=True).sqrt()
    before = weight.detach().clone()
    try:
        for neutral in (1.0, 0.0):
            weight.fill_(neutral)
            if (norm(probe) - wanted).abs().max() <= _SAME * wanted.abs().max():
                return neutral
    finally:
        weight.copy_(before)
    return None
