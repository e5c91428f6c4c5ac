"""What makes the network's input of images; its settings travel as preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from pipeline.driving.letterbox import Letterbox
from pipeline.driving.network import QyolopConfig


class QyolopImageProcessor(BaseImageProcessor):
    """Images of any size, laid into the network's input, as numbers from 0 to 1.

    Args:
        size: `height` and `width` of the input.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, size: dict[str, int] | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.size = {"height": 192, "width": 320} if size is None else dict(size)

    @classmethod
    def for_size(cls, size: tuple[int, int]) -> QyolopImageProcessor:
        """The processor for a network's input of this height and width."""
        return cls({"height": size[0], "width": size[1]})

    def place(self, image: np.ndarray) -> Letterbox:
        """Where an image uint8 [H, W, 3] lies in the input."""
        return Letterbox.of(
            (image.shape[0], image.shape[1]), (self.size["height"], self.size["width"])
        )

    def __call__(self, images: Sequence[np.ndarray], **_: Any) -> BatchFeature:
        """`pixel_values`, float32 [N, 3, H, W], of images uint8 [H, W, 3] of any sizes."""
        pixels = np.stack([self.place(image).image(image) for image in images])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return BatchFeature({"pixel_values": values.contiguous()})


AutoImageProcessor.register(QyolopConfig, QyolopImageProcessor, exist_ok=True)
