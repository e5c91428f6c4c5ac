"""Put factors, and quantised matrices, into a model in place of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.checkpoint.modeling_quantized import QuantizedLinear
from pipeline.checkpoint.modeling_skipcat import FactoredLinear, stored_layer
from pipeline.model.numbers import cast
from pipeline.quantize.groupwise import Blocks


def group_tensors(
    members: tuple[str, ...],
    heights: list[int],
    down: torch.Tensor | Blocks,
    up: torch.Tensor | Blocks,
    permutation: torch.Tensor | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint stores for one group, by name.

    The first member owns `down` and `permutation`; every member has its own rows of `up`.

    Args:
        members: dotted names of the linears, in stacking order.
        heights: their rows.
        down: A' [r, n - r] or A [r, n], as numbers or as codes.
        up: B' or B [m, r], likewise.
        permutation: int [n] of the block-skip form, else None.
        dtype: of what is stored as numbers.

    Raises:
        InputError: a factor is not finite, or does not fit the type.
    """
    owner = members[0]
    if isinstance(down, Blocks):
        tensors = _prefixed(f"{owner}.down.stored", down.stored_tensors())
    else:
        name = f"{owner}.down.weight"
        tensors = {name: cast(name, down, dtype).contiguous()}
    if permutation is not None:
        tensors[f"{owner}.permutation"] = permutation.to(torch.int32)
    if isinstance(up, Blocks):
        return tensors | dense_tensors(members, heights, up, ".up.stored")
    for member, rows in zip(members, up.split(heights), strict=True):
        name = f"{member}.up.weight"
        tensors[name] = cast(name, rows, dtype).contiguous()
    return tensors


def dense_tensors(
    members: tuple[str, ...], heights: list[int], codes: Blocks, suffix: str = ".stored"
) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint stores for quantised dense matrices, by name: each its own rows."""
    tensors: dict[str, torch.Tensor] = {}
    for name, rows in member_codes(members, heights, codes, suffix).items():
        tensors |= _prefixed(name, rows.stored_tensors())
    return tensors


def member_codes(
    members: tuple[str, ...], heights: list[int], codes: Blocks, suffix: str = ".stored"
) -> dict[str, Blocks]:
    """The codes of each member of a stack, by the name of the module that holds them."""
    stops = [sum(heights[: place + 1]) for place in range(len(heights))]
    return {
        member + suffix: codes.rows(stop - height, stop)
        for member, height, stop in zip(members, heights, stops, strict=True)
    }


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def group_entries(
    members: tuple[str, ...],
    form: str,
    rank: int,
    down_format: str | None = None,
    up_format: str | None = None,
) -> dict[str, dict[str, Any]]:
    """`quantization_config.modules` entries of one group, owner first."""
    formats = {"down_style": down_format, "up_style": up_format}
    entry = {"form": form, "rank": rank} | {k: v for k, v in formats.items() if v is not None}
    shares = form != "dense"
    return {
        member: entry | {"owner": members[0] if shares and member != members[0] else None}
        for member in members
    }


def install_(
    model: nn.Module, entries: dict[str, dict[str, Any]], tensors: dict[str, torch.Tensor]
) -> None:
    """Replace layers by those that hold `tensors`; the biases of linears are taken over.

    Args:
        model: changed in place.
        entries: as `group_entries` makes them; owners before those that share with them.
        tensors: as `group_tensors` and `dense_tensors` make them.
    """
    for name, entry in entries.items():
        layer = stored_layer(model, name, entry, device="meta")
        bias = getattr(model.get_submodule(name), "bias", None)
        if bias is not None and isinstance(layer, FactoredLinear | QuantizedLinear):
            (layer.up if isinstance(layer, FactoredLinear) else layer).bias = bias
        own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        for part, empty in own.items():
            if empty.is_meta:
                _set(layer, part, tensors[f"{name}.{part}"], empty)
        model.set_submodule(name, layer)


def _set(layer: nn.Module, part: str, tensor: torch.Tensor, empty: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer of the same kind."""
    path, _, attribute = part.rpartition(".")
    value = tensor.to(empty.dtype)
    if isinstance(empty, nn.Parameter):
        value = nn.Parameter(value, requires_grad=empty.requires_grad)
    setattr(layer.get_submodule(path), attribute, value)
