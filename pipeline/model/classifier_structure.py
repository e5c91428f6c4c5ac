"""What an image classifier is made of, found by running it: the linears that share an input.

No list of architectures and no list of names, and no chain of equal layers is asked for: stages,
merging of patches and windows are as good. What is compressed is every nn.Linear inside a list of
modules (the encoder) that one forward pass runs exactly once; convolutions, embeddings and the
head, which stand outside, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import InputError, first_line
from pipeline.model.load import Shape
from pipeline.model.structure import Group, Layer, evaluating


@dataclass(frozen=True)
class ImageStructure:
    """Layers and groups of an image classifier.

    Attributes:
        layers: in the order in which their first linear runs.
        rows: group -> how many input vectors one image gives it.
        left_out: linear of the encoder -> why it stays as it is.
    """

    layers: list[Layer]
    rows: dict[str, int]
    left_out: dict[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel, shape: Shape) -> ImageStructure:
        """Run one image and read off which linears there are and which share an input.

        Args:
            model: an image classifier.
            shape: channels, height and width of an image.

        Raises:
            InputError: it gives no logits, or has no linears in a list of modules.
        """
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        encoder = {name: _layer_of(model, name) for name in linears}
        calls = _trace(model, {n: linears[n] for n, layer in encoder.items() if layer}, shape)
        left_out = _left_out(linears, calls)
        left_out |= {n: "it is not run" for n, layer in encoder.items() if layer and n not in calls}
        by_input: dict[tuple[int, str], list[str]] = {}
        for name, made in calls.items():
            if name not in left_out:
                by_input.setdefault((id(made[0]), encoder[name]), []).append(name)
        layers: dict[str, list[Group]] = {}
        rows = {}
        for (_, layer), members in by_input.items():
            heights = tuple(linears[member].out_features for member in members)
            group = Group(tuple(members), linears[members[0]].in_features, heights)
            rows[group.name] = calls[group.name][0].shape[:-1].numel()
            layers.setdefault(layer, []).append(group)
        if not layers:
            raise InputError(
                "No linear layers were found in a list of modules.",
                where=type(model).__name__,
                observed=f"{len(linears)} linear layers in all",
                expected="an encoder of nn.Linear",
            )
        return cls([Layer(n, tuple(g)) for n, g in layers.items()], rows, left_out)


def _layer_of(model: nn.Module, name: str) -> str:
    """The innermost element of a list of modules that a linear is in; empty if there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 1, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return ""


def _trace(
    model: PreTrainedModel, linears: dict[str, nn.Linear], shape: Shape
) -> dict[str, list[torch.Tensor]]:
    """Inputs of every linear in one forward pass; kept alive, so that identities stay unique."""
    calls: dict[str, list[torch.Tensor]] = {}
    hooks = [linear.register_forward_pre_hook(_recorder(calls, n)) for n, linear in linears.items()]
    probe = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), evaluating(model):
            output = model(pixel_values=probe.to(model.dtype))
    except Exception as error:
        raise InputError(
            "The model does not take images of the shape that its config names.",
            where=type(model).__name__,
            observed=first_line(error),
            expected=str(shape),
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    logits = getattr(output, "logits", None)
    if logits is None or tuple(logits.shape) != (1, model.config.num_labels):
        raise InputError(
            "The model gives no logits of its classes.",
            where=type(model).__name__,
            observed=None if logits is None else tuple(logits.shape),
            expected=(1, model.config.num_labels),
        )
    return calls


def _recorder(calls: dict[str, list[torch.Tensor]], name: str) -> Any:
    def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        calls.setdefault(name, []).append(args[0])

    return record


def _left_out(
    linears: dict[str, nn.Linear], calls: dict[str, list[torch.Tensor]]
) -> dict[str, str]:
    """Linears that are run, but cannot be replaced one by one."""
    holders: dict[int, list[str]] = {}
    for name, linear in linears.items():
        holders.setdefault(id(linear.weight), []).append(name)
    reasons = {}
    for name, made in calls.items():
        sharing = holders.get(id(linears[name].weight), [])
        if len(made) != 1:
            reasons[name] = f"it is run {len(made)} times for one image"
        elif len(sharing) > 1:
            reasons[name] = f"its weight is shared by {', '.join(sharing)}"
    return reasons
