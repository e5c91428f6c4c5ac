"""Blocks of the network: convolution with its norm, ELAN, spatial pyramid pooling, mask decoder."""

from __future__ import annotations

import torch
from torch import nn

_POOL = 5


class ConvUnit(nn.Sequential):
    """A convolution without bias, batch normalisation, ReLU: what a runtime folds into one."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outside), nn.ReLU())


class Elan(nn.Module):
    """Efficient layer aggregation: paths of 0, 1 and 2 3x3 convolutions, concatenated (2211.04800).

    Args:
        inside: channels in.
        hidden: channels of each path.
        outside: channels out.
    """

    def __init__(self, inside: int, hidden: int, outside: int) -> None:
        super().__init__()
        self.short = ConvUnit(inside, hidden)
        self.entry = ConvUnit(inside, hidden)
        self.first = ConvUnit(hidden, hidden, 3)
        self.second = ConvUnit(hidden, hidden, 3)
        self.merge = ConvUnit(4 * hidden, outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, outside, H, W] of [B, inside, H, W]."""
        entry = self.entry(x)
        first = self.first(entry)
        return self.merge(torch.cat((self.short(x), entry, first, self.second(first)), dim=1))


class PyramidPooling(nn.Module):
    """Maxima over windows of 5, 9 and 13 pixels: a chain of 5s, which is the same (1406.4729)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        hidden = inside // 2
        self.entry = ConvUnit(inside, hidden)
        self.pool = nn.MaxPool2d(_POOL, 1, _POOL // 2)
        self.merge = ConvUnit(4 * hidden, outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, outside, H, W] of [B, inside, H, W]."""
        pooled = [self.entry(x)]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        return self.merge(torch.cat(pooled, dim=1))


class MaskDecoder(nn.Module):
    """From a level of the pyramid to logits of every pixel of the image.

    Each step doubles the resolution and joins what the backbone had there; the last doubling puts
    four channels side by side, which costs a quarter of a convolution at full size.

    Args:
        inside: channels in.
        skips: channels of the backbone's features at each doubling but the last; 0 joins none.
        width: channels of the steps.
    """

    def __init__(self, inside: int, skips: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.entry = ConvUnit(inside, width)
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.steps = nn.ModuleList(ConvUnit(width + skip, width, 3) for skip in skips)
        self.logits = nn.Conv2d(width, 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor, skips: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """Logits [B, 1, s H, s W] of features [B, inside, H, W], s = 2^(steps + 1)."""
        x = self.entry(x)
        for step, skip in zip(self.steps, skips, strict=True):
            x = self.up(x)
            x = step(x if skip is None else torch.cat((x, skip), dim=1))
        return self.shuffle(self.logits(x))
