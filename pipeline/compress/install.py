"""Put factors into a model in place of its linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.compress.factor import Factors
from pipeline.compress.modeling_skipcat import factored_linear


def group_tensors(
    members: tuple[str, ...], heights: list[int], factors: Factors, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint stores for one group, by name.

    The first member owns `down` and `permutation`; every member has its own rows of `up`.
    """
    owner = members[0]
    tensors = {f"{owner}.down.weight": factors.down.to(dtype).contiguous()}
    if factors.permutation is not None:
        tensors[f"{owner}.permutation"] = factors.permutation.to(torch.int32)
    for member, rows in zip(members, factors.up.split(heights), strict=True):
        tensors[f"{member}.up.weight"] = rows.to(dtype).contiguous()
    return tensors


def group_entries(members: tuple[str, ...], form: str, rank: int) -> dict[str, dict[str, Any]]:
    """`quantization_config.modules` entries of one group, owner first."""
    return {
        member: {"form": form, "rank": rank, "owner": None if member == members[0] else members[0]}
        for member in members
    }


def install_(
    model: nn.Module, entries: dict[str, dict[str, Any]], tensors: dict[str, torch.Tensor]
) -> None:
    """Replace linears by factored layers that hold `tensors`; biases are taken over.

    Args:
        model: changed in place.
        entries: as `group_entries` makes them.
        tensors: as `group_tensors` makes them.
    """
    for name, entry in entries.items():
        factored = factored_linear(model, name, entry, device="meta")
        bias = getattr(model.get_submodule(name), "bias", None)
        dtype = factored.up.weight.dtype
        factored.up.weight = nn.Parameter(tensors[f"{name}.up.weight"].to(dtype))
        if bias is not None:
            factored.up.bias = bias
        if entry["owner"] is None:
            factored.down.weight = nn.Parameter(tensors[f"{name}.down.weight"].to(dtype))
            if entry["form"] == "skip":
                factored.permutation = tensors[f"{name}.permutation"]
        model.set_submodule(name, factored)


def rebind_(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Let factors that are installed read from other tensors of equal values.

    Tensors that were read from a file stay in that file until they are used, and leave memory
    again when it is needed: a model larger than memory is compressed layer by layer.

    Args:
        model: changed in place.
        tensors: parameter or buffer name -> tensor, as `group_tensors` makes them.
    """
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        held = getattr(model.get_submodule(path), attribute)
        if held.dtype == tensor.dtype:
            held.data = tensor
