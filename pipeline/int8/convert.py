"""From a network and its grids to layers that hold codes: norms folded, kernels rounded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pipeline.checkpoint.install import install_
from pipeline.checkpoint.modeling_quantized import Codes
from pipeline.int8.grids import ActivationGrid, with_bias
from pipeline.int8.ranges import weight_scales
from pipeline.int8.runtimes import Int8Runtime
from pipeline.int8.structure import ConvStructure
from pipeline.quantize.groupwise import pack_codes

Entries = dict[str, dict[str, Any]]
Kernel = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class WeightRounding:
    """How kernels are rounded.

    Attributes:
        bits: of a code.
        per_channel: every output has a scale of its own.
        squares: scales of least squared error, instead of those that just hold every weight.
    """

    bits: int = 8
    per_channel: bool = True
    squares: bool = True

    @property
    def codes(self) -> Codes:
        """The codes of a weight."""
        return Codes(self.bits, narrow=True)

    def scales(self, weight: torch.Tensor) -> torch.Tensor:
        """Of the outputs of a kernel: float32 [m]."""
        return weight_scales(weight, self.codes, per_channel=self.per_channel, squares=self.squares)


def int8_entries(
    structure: ConvStructure,
    grids: Mapping[int, ActivationGrid],
    runtime: Int8Runtime,
    rounding: WeightRounding,
    convs: Collection[str] | None = None,
) -> Entries:
    """`quantization_config.modules` of a network whose convolutions are rounded.

    Args:
        structure: of the network.
        grids: of its tensors.
        runtime: says where activations are rounded.
        rounding: of the kernels.
        convs: those that are rounded; by default all.

    Returns:
        Name of the module -> its form, the codes of its input and output if they are rounded
        there, and the numbers of their grids; `bits` are those of a kernel, `into` of a folded
        norm is its convolution.
    """
    chosen = structure.convs if convs is None else {n: structure.convs[n] for n in convs}
    rounded = {site.reads for site in chosen.values()} if runtime.outputs else set()
    entries: Entries = {}

    def codes(number: int | None) -> str | None:
        return grids[number].codes.name if number in rounded and number is not None else None

    for name, number in structure.activations.items():
        if number in rounded:
            entries[name] = _entry("activation", output=codes(number), gives=number)
    for name, site in chosen.items():
        entries[name] = _entry("conv", output=codes(site.gives), gives=site.gives)
        if site.norm is not None:
            entries[site.norm] = _entry("folded", into=name)
    for name, site in chosen.items():
        held = site.source in entries and entries[site.source]["output"] is not None
        kind = None if held else grids[site.reads].codes.name
        entries[name] |= {"input": kind, "reads": site.reads, "bits": rounding.bits}
    return entries


def _entry(form: str, **fields: Any) -> dict[str, Any]:
    return {"form": form, "owner": None} | fields


def folded_kernels(model: nn.Module, entries: Entries) -> dict[str, Kernel]:
    """Weights and biases of the convolutions to be, with their norms in them.

    Args:
        model: never rounded.
        entries: as `int8_entries` has them.

    Returns:
        Name of the convolution -> float32 [m, n, height, width] and [m].
    """
    norms = {e["into"]: name for name, e in entries.items() if e["form"] == "folded"}
    kernels = {}
    for name in conv_names(entries):
        conv: Any = model.get_submodule(name)
        weight, bias = conv.weight.detach().double(), conv.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        if name in norms:
            norm: Any = model.get_submodule(norms[name])
            folded: Any = [
                None if t is None else t.double()
                for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
            ]
            mean, variance, gain, shift = folded
            weight, bias = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, gain, shift)
        kernels[name] = (weight.detach().float(), bias.detach().float())
    return kernels


def conv_names(entries: Entries) -> list[str]:
    """The convolutions among entries."""
    return [name for name, entry in entries.items() if entry["form"] == "conv"]


def int8_tensors(
    entries: Entries,
    grids: Mapping[int, ActivationGrid],
    kernels: Mapping[str, Kernel],
    rounding: WeightRounding,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint stores for entries, by name.

    Args:
        entries: as `int8_entries` has them.
        grids: of the tensors, by their numbers.
        kernels: of the convolutions.
        rounding: of the kernels.
        scales: of kernels, float32 [m], where they are known already.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        for part, place in (("input", "reads"), ("output", "gives")):
            if entry.get(part) is not None:
                tensors |= _grid_tensors(f"{name}.{part}", grids[entry[place]])
        if entry["form"] == "conv":
            weight, bias = kernels[name]
            own = rounding.scales(weight) if scales is None else scales[name]
            own, bias = with_bias(own, bias, torch.tensor(grids[entry["reads"]].scale))
            codes = rounding.codes.of(weight, own[:, None, None, None])
            tensors[f"{name}.codes"] = _stored(codes, rounding.bits)
            tensors[f"{name}.scales"] = _short_bits(own)
            tensors[f"{name}.bias"] = bias
    return tensors


def _grid_tensors(prefix: str, grid: ActivationGrid) -> dict[str, torch.Tensor]:
    scale = _short_bits(torch.tensor([grid.scale]))
    return {f"{prefix}.grid": torch.cat((scale, torch.tensor([grid.zero], dtype=torch.int16)))}


def _short_bits(scales: torch.Tensor) -> torch.Tensor:
    """The bits of bfloat16, int16: a short scale has no more of them."""
    return scales.to(torch.bfloat16).view(torch.int16)


def _stored(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of a kernel [m, n, height, width] as `Int8Conv` holds them."""
    if bits == 8:
        return codes.to(torch.int8)
    counted = (codes.flatten(1) + 2 ** (bits - 1)).to(torch.uint8)
    return torch.from_numpy(pack_codes(counted.numpy(), bits))


@contextmanager
def as_rounded(
    model: nn.Module, entries: Entries, tensors: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Inside, a network is rounded; behind, it is as it was.

    Args:
        model: changed in place.
        entries: what is rounded.
        tensors: of it.
    """
    own = {name: model.get_submodule(name) for name in entries}
    install_(model, entries, tensors)
    try:
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
