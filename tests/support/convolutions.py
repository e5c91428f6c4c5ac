"""Small networks of convolutions with every way in which tensors share a grid."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from pipeline.int8.calibrate import activation_grids, observe
from pipeline.int8.convert import (
    Entries,
    WeightRounding,
    folded_kernels,
    int8_entries,
    int8_tensors,
)
from pipeline.int8.ranges import Observer
from pipeline.int8.runtimes import _INT8_RUNTIMES
from pipeline.int8.structure import ConvStructure

SIZE = (12, 16)


def unit(inside: int, outside: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU())


class SmallNet(nn.Module):
    """Units, a concatenation, a sum, maxima, a depthwise convolution, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.left, self.right = unit(8, 8, 1), unit(8, 8)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2.0)
        self.merge = unit(16, 8)
        self.deep = unit(8, 8, groups=8)
        self.plain = nn.Conv2d(8, 8, 1)  # neither norm nor activation
        self.relu = nn.ReLU()
        self.last = unit(16, 8)
        self.boxes, self.mask = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stem(x)
        both = self.merge(torch.cat((self.left(x), self.right(x)), dim=1))
        low = self.plain(self.deep(self.pool(both)))
        summed = self.relu(both + self.up(low))
        x = self.last(torch.cat((summed, both), dim=1))
        return self.boxes(x), self.mask(x)


def small_net(seed: int = 0) -> SmallNet:
    """In evaluation mode, with norms that were fed."""
    torch.manual_seed(seed)
    model = SmallNet()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.5)
        for batch in images(8, seed=1):
            model.train()(batch)
    return model.eval()


def images(count: int, seed: int = 0, batch_size: int = 2) -> list[torch.Tensor]:
    """Batches of pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch_size, 3, *SIZE, generator=generator) for _ in range(count)]


@cache
def seen_in_small_net() -> tuple[ConvStructure, dict[int, Observer]]:
    """Structure of `small_net`, and what its tensors hold over some images."""
    model, batches = small_net(), images(3)
    structure = ConvStructure.of(model, batches[0])
    return structure, observe(model, structure, batches)


def rounded_small_net(
    runtime: str, bits: int = 8, convs: list[str] | None = None
) -> tuple[SmallNet, Entries, dict[str, torch.Tensor]]:
    """A network that was not changed yet, and what rounds it."""
    (structure, seen), model, row = seen_in_small_net(), small_net(), _INT8_RUNTIMES[runtime]
    grids = activation_grids(seen, row, bits=bits)
    rounding = WeightRounding(bits)
    entries = int8_entries(structure, grids, row, rounding, convs)
    kernels = folded_kernels(model, entries)
    return model, entries, int8_tensors(entries, grids, kernels, rounding)
