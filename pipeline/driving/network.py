"""The network as a model of transformers: ELAN backbone, feature pyramid, boxes and two masks.

The parts are those of Q-YOLOP (2307.04537) and its kin: an ELAN backbone (2211.04800), a pyramid
upwards and downwards (1803.01534), boxes from three levels by anchors, the drivable area from a
deeper level than the lane lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from pipeline.errors import InputError

_POOL = 5
STRIDES = (8, 16, 32)
BOX_FIELDS = 5  # x, y, width, height, objectness; the classes follow
# Sides in pixels at 192 x 320, three for each stride: cars are wider than high, lorries are not.
_ANCHORS = (
    ((8, 7), (13, 10), (11, 17)),
    ((21, 16), (33, 24), (24, 38)),
    ((52, 38), (64, 70), (110, 84)),
)
_PRIOR = 0.01  # of a cell that holds an object, where training begins


class _ConvUnit(nn.Sequential):
    """A convolution without bias, batch normalisation, ReLU: what a runtime folds into one."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1) -> None:
        conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outside), nn.ReLU())


class _Elan(nn.Module):
    """Efficient layer aggregation: paths of 0, 1 and 2 3x3 convolutions, concatenated (2211.04800).

    Args:
        inside: channels in.
        hidden: channels of each path.
        outside: channels out.
    """

    def __init__(self, inside: int, hidden: int, outside: int) -> None:
        super().__init__()
        self.short = _ConvUnit(inside, hidden)
        self.entry = _ConvUnit(inside, hidden)
        self.first = _ConvUnit(hidden, hidden, 3)
        self.second = _ConvUnit(hidden, hidden, 3)
        self.merge = _ConvUnit(4 * hidden, outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, outside, H, W] of [B, inside, H, W]."""
        entry = self.entry(x)
        first = self.first(entry)
        return self.merge(torch.cat((self.short(x), entry, first, self.second(first)), dim=1))


class _PyramidPooling(nn.Module):
    """Maxima over windows of 5, 9 and 13 pixels: a chain of 5s, which is the same (1406.4729)."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        hidden = inside // 2
        self.entry = _ConvUnit(inside, hidden)
        self.pool = nn.MaxPool2d(_POOL, 1, _POOL // 2)
        self.merge = _ConvUnit(4 * hidden, outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, outside, H, W] of [B, inside, H, W]."""
        pooled = [self.entry(x)]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        return self.merge(torch.cat(pooled, dim=1))


class _MaskDecoder(nn.Module):
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
        self.entry = _ConvUnit(inside, width)
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.steps = nn.ModuleList(_ConvUnit(width + skip, width, 3) for skip in skips)
        self.logits = nn.Conv2d(width, 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor, skips: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
        """Logits [B, 1, s H, s W] of features [B, inside, H, W], s = 2^(steps + 1)."""
        x = self.entry(x)
        for step, skip in zip(self.steps, skips, strict=True):
            x = self.up(x)
            x = step(x if skip is None else torch.cat((x, skip), dim=1))
        return self.shuffle(self.logits(x))


class QyolopConfig(PreTrainedConfig):
    """What the network is, by numbers.

    Args:
        image_size: height and width of its input, multiples of 32.
        width: channels of the first convolution; all others are multiples of it.
        anchors: three width-height pairs in pixels for each of the strides 8, 16 and 32.
    """

    model_type = "qyolop"

    def __init__(
        self,
        image_size: tuple[int, int] = (192, 320),
        width: int = 16,
        anchors: Any = _ANCHORS,
        **keywords: Any,
    ) -> None:
        self.image_size = list(image_size)
        self.num_channels = 3
        self.width = width
        self.anchors = [[list(pair) for pair in level] for level in anchors]
        keywords.setdefault("id2label", {0: "vehicle"})
        super().__init__(**keywords)

    def check(self, where: object) -> None:
        """Refuse numbers that make no network.

        Raises:
            InputError: says which.
        """
        whole = all(type(side) is int and side > 0 and not side % 32 for side in self.image_size)
        if len(self.image_size) != 2 or not whole:
            raise InputError(
                "The network's input must be a multiple of its largest stride.",
                where=where,
                observed=f"image_size {self.image_size}",
                expected="height and width, multiples of 32",
            )
        if type(self.width) is not int or not 2 <= self.width <= 256 or self.width % 2:
            raise InputError(
                "The network's width is out of range.",
                where=where,
                observed=f"width {self.width}",
                expected="an even number from 2 to 256",
            )
        shape = [len(level) for level in self.anchors]
        sides = [side for level in self.anchors for pair in level for side in pair]
        if shape != [3] * len(STRIDES) or len(sides) != 18 or not all(s > 0 for s in sides):
            raise InputError(
                "The anchors do not fit the strides of the network.",
                where=where,
                observed=f"{shape} anchors",
                expected=f"3 pairs of sides above 0 for each of the strides {STRIDES}",
            )


@dataclass
class DrivingMaps(ModelOutput):
    """What the network says of images, undecoded.

    Attributes:
        boxes: for each stride float [B, 3 (5 + classes), H / stride, W / stride].
        drivable: logits [B, 1, H, W].
        lane: logits [B, 1, H, W].
    """

    boxes: tuple[torch.Tensor, ...] | None = None
    drivable: torch.Tensor | None = None
    lane: torch.Tensor | None = None


class _Backbone(nn.Module):
    """Features at strides 2, 4, 8, 16 and 32, of w, 2w, 4w, 8w and 8w channels."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.stem = _ConvUnit(3, w, 3, 2)
        self.down = _ConvUnit(w, 2 * w, 3, 2)
        self.pool = nn.MaxPool2d(2)
        self.stages = nn.ModuleList(
            _Elan(inside * w, hidden * w, outside * w)
            for inside, hidden, outside in ((2, 1, 2), (2, 2, 4), (4, 3, 8), (8, 4, 8))
        )
        self.spread = _PyramidPooling(8 * w, 8 * w)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = [self.stem(x)]
        x = self.down(features[0])
        for place, stage in enumerate(self.stages):
            x = stage(self.pool(x) if place else x)
            features.append(x)
        return [*features[:-1], self.spread(features[-1])]


class _Pyramid(nn.Module):
    """What is at strides 8 and 16 told by what is below it, and then the other way round."""

    def __init__(self, w: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.lateral_32, self.lateral_16 = _ConvUnit(8 * w, 4 * w), _ConvUnit(8 * w, 4 * w)
        self.top_16 = _Elan(8 * w, 2 * w, 4 * w)
        self.narrow_16, self.lateral_8 = _ConvUnit(4 * w, 2 * w), _ConvUnit(4 * w, 2 * w)
        self.top_8 = _Elan(4 * w, w + w // 2, 2 * w)
        self.down_8 = _ConvUnit(2 * w, 2 * w, 3, 2)
        self.out_16 = _Elan(6 * w, 2 * w, 4 * w)
        self.down_16 = _ConvUnit(4 * w, 4 * w, 3, 2)
        self.out_32 = _Elan(8 * w, 2 * w, 8 * w)

    def forward(
        self, p8: torch.Tensor, p16: torch.Tensor, p32: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Levels for boxes, and those at strides 16 and 8 as they are on the way up."""
        deep = self.lateral_32(p32)
        f16 = self.top_16(torch.cat((self.up(deep), self.lateral_16(p16)), dim=1))
        f8 = self.top_8(torch.cat((self.up(self.narrow_16(f16)), self.lateral_8(p8)), dim=1))
        n16 = self.out_16(torch.cat((self.down_8(f8), f16), dim=1))
        n32 = self.out_32(torch.cat((self.down_16(n16), deep), dim=1))
        return [f8, n16, n32], f16, f8


class QyolopForDrivingPerception(PreTrainedModel):
    """Vehicles as boxes, the drivable area and lane lines as masks, of one image."""

    config_class = QyolopConfig
    base_model_prefix = "qyolop"
    main_input_name = "pixel_values"
    config: QyolopConfig
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: QyolopConfig) -> None:
        super().__init__(config)
        config.check(config.name_or_path or "QyolopConfig")
        w = config.width
        self.backbone, self.pyramid = _Backbone(w), _Pyramid(w)
        fields = 3 * (BOX_FIELDS + len(config.id2label))
        self.box_heads = nn.ModuleList(
            nn.Sequential(_ConvUnit(c * w, c * w, 3), nn.Conv2d(c * w, fields, 1))
            for c in (2, 4, 8)
        )
        self.drivable_head = _MaskDecoder(4 * w, (2 * w, 2 * w, 0), w)
        self.lane_head = _MaskDecoder(2 * w, (2 * w, w), w)
        self.post_init()

    def get_input_embeddings(self) -> None:
        """None: an image has none, which transformers would rather raise for."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d) and module.bias is not None:  # of a head
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
            if module.kernel_size == (1, 1):
                # Most cells hold nothing: without this the first steps only learn that.
                rare = module.bias.data.view(3, -1)[:, 4]
                nn.init.constant_(rare, math.log(_PRIOR / (1 - _PRIOR)))
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.running_mean)  # type: ignore[arg-type]
            nn.init.ones_(module.running_var)  # type: ignore[arg-type]

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> DrivingMaps:
        """Undecoded boxes and masks.

        Args:
            pixel_values: float [B, 3, H, W] in [0, 1]; H and W are multiples of 32.
        """
        p2, p4, p8, p16, p32 = self.backbone(pixel_values)
        levels, f16, f8 = self.pyramid(p8, p16, p32)
        boxes = tuple(head(level) for head, level in zip(self.box_heads, levels, strict=True))
        drivable = self.drivable_head(f16, (f8, p4, None))
        return DrivingMaps(boxes, drivable, self.lane_head(f8, (p4, p2)))


AutoConfig.register(QyolopConfig.model_type, QyolopConfig, exist_ok=True)
AutoModel.register(QyolopConfig, QyolopForDrivingPerception, exist_ok=True)
