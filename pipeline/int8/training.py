"""Training under rounding: a network that rounds as it will when it holds codes, with gradients.

Norms are folded before, and so are trained as part of the kernels, with the statistics they had.
Scales are trained, too (learned step sizes, 1902.08153), as logarithms, so that a step of the
optimizer changes a large one as much as a small one; zero points stay. What is computed is bit for
bit what the finished network computes, so that nothing is trained that is not delivered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.checkpoint.install import install_
from pipeline.checkpoint.modeling_quantized import (
    ActivationRounding,
    Codes,
    Int8Conv,
    RoundedActivation,
    short_numbers,
)
from pipeline.errors import InputError
from pipeline.int8.convert import Entries, Kernel, WeightRounding, conv_names, int8_tensors
from pipeline.int8.grids import ActivationGrid, fake_quantize, short_scale, with_bias


class _Step(nn.Module):
    """A scale that is learned: the tensors that share a grid share it.

    Args:
        grid: where it begins.
    """

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.codes, self.zero = grid.codes, grid.zero
        self.logarithm = nn.Parameter(_logarithm(torch.tensor(grid.scale)))

    def scale(self) -> torch.Tensor:
        return _scale(self.logarithm)

    def grid(self) -> ActivationGrid:
        return ActivationGrid(self.codes, float(self.scale().detach()), self.zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x.float(), self.scale(), self.zero, self.codes)


class _TrainedActivation(nn.Module):
    """An activation whose outputs are rounded, with gradients."""

    def __init__(self, activation: nn.Module, step: _Step) -> None:
        super().__init__()
        self.activation, self.step = activation, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(self.activation(x))


class _TrainedConv(nn.Conv2d):
    """A convolution whose kernel and bias are rounded as they are used.

    Args:
        like: a convolution of the same geometry, in numbers or in codes.
        kernel: weight and bias to begin with.
        scales: of the kernel, float32 [m].
        codes: of the kernel.
        reads: the grid of what it reads.
        rounds: whether it rounds that itself.
        gives: the grid of what it gives, if that is rounded.
    """

    def __init__(
        self,
        like: Any,
        kernel: Kernel,
        scales: torch.Tensor,
        codes: Codes,
        reads: _Step,
        rounds: bool,
        gives: _Step | None,
    ) -> None:
        weight, bias = kernel
        super().__init__(
            weight.shape[1] * like.groups,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            like.stride,
            like.padding,
            like.dilation,
            like.groups,
        )
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(bias.clone())
        self.logarithms = nn.Parameter(_logarithm(scales))
        self.codes, self.reads, self.rounds, self.gives = codes, reads, rounds, gives

    def scales(self) -> torch.Tensor:
        return _scale(self.logarithms)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None
        scales, bias = with_bias(self.scales(), self.bias, self.reads.scale())
        weight = fake_quantize(self.weight, scales[:, None, None, None], 0, self.codes)
        read = self.reads(x) if self.rounds else x
        y = F.conv2d(read, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return y if self.gives is None else self.gives(y)


def _logarithm(scales: torch.Tensor) -> torch.Tensor:
    """To the base 2, of a number just below: the next short one is the scale itself."""
    return (scales.double().log2() - 1e-6).float()


def _scale(logarithm: torch.Tensor) -> torch.Tensor:
    return short_scale(torch.exp2(logarithm))


def train_rounded_(
    model: nn.Module,
    entries: Entries,
    grids: Mapping[int, ActivationGrid],
    kernels: Mapping[str, Kernel],
    rounding: WeightRounding,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Make a network round as it is trained.

    Stay in evaluation mode: norms that are not folded keep their statistics.

    Args:
        model: in numbers, or in codes; changed in place.
        entries: as `int8_entries` has them.
        grids: where those of activations begin.
        kernels: where kernels begin: of the network in numbers, folded, if it is at hand.
        rounding: of the kernels.
        scales: where those of kernels begin; by default those of least error.
    """
    steps = {number: _Step(grid) for number, grid in grids.items()}
    for name, entry in entries.items():
        layer: Any = model.get_submodule(name)
        gives = None if entry.get("output") is None else steps[entry["gives"]]
        new: nn.Module = nn.Identity()
        if entry["form"] == "activation":
            own = layer.activation if isinstance(layer, RoundedActivation) else layer
            assert gives is not None
            new = _TrainedActivation(own, gives)
        elif entry["form"] == "conv":
            kernel, reads = kernels[name], steps[entry["reads"]]
            own = rounding.scales(kernel[0]) if scales is None else scales[name]
            rounds = entry["input"] is not None
            new = _TrainedConv(layer, kernel, own, rounding.codes, reads, rounds, gives)
        model.set_submodule(name, new)


def scale_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The logarithms of scales of a network that rounds as it is trained: they do not decay."""
    for module in model.modules():
        if isinstance(module, _Step):
            yield module.logarithm
        elif isinstance(module, _TrainedConv):
            yield module.logarithms


def finish_training_(
    model: nn.Module, entries: Entries, rounding: WeightRounding
) -> dict[str, torch.Tensor]:
    """Put layers that hold codes in the place of those that were trained.

    Args:
        model: as `train_rounded_` made it; changed in place.
        entries: as there.
        rounding: as there.

    Returns:
        The tensors that a checkpoint stores for the entries.

    Raises:
        InputError: a number is not finite: training has diverged.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError("Training under rounding has diverged.", observed=f"{name}")
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in conv_names(entries)}
    grids = {entries[name]["reads"]: layer.reads.grid() for name, layer in layers.items()}
    kernels = {n: (layer.weight.detach(), layer.bias.detach()) for n, layer in layers.items()}
    scales = {name: layer.scales().detach() for name, layer in layers.items()}
    tensors = int8_tensors(entries, grids, kernels, rounding, scales)
    for name, entry in entries.items():
        if entry["form"] == "activation":
            trained: Any = model.get_submodule(name)
            model.set_submodule(name, trained.activation)
    install_(model, entries, tensors)
    return tensors


def stored_rounding(
    model: nn.Module, entries: Entries
) -> tuple[dict[int, ActivationGrid], dict[str, Kernel], dict[str, torch.Tensor]]:
    """What `train_rounded_` begins with, of a network that holds codes.

    Args:
        model: with the layers of the entries in place.
        entries: of its checkpoint.

    Returns:
        Grids by their numbers; kernels as their codes stand for them; scales of the kernels.
    """
    grids: dict[int, ActivationGrid] = {}
    kernels: dict[str, Kernel] = {}
    scales: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        layer = model.get_submodule(name)
        for part, place in (("input", "reads"), ("output", "gives")):
            held = getattr(layer, part, None)
            if isinstance(held, ActivationRounding):
                grid = ActivationGrid(held.codes, float(held.scale), int(held.zero_point))
                grids[entry[place]] = grid
        if isinstance(layer, Int8Conv):
            kernels[name] = (layer.weight, layer.bias.detach().float())
            scales[name] = short_numbers(layer.scales)
    return grids, kernels, scales
