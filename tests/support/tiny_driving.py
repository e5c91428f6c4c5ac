"""A small driving network with weights that say something everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.driving.network import QyolopConfig, QyolopForDrivingPerception
from pipeline.driving.preprocess import QyolopImageProcessor

SIZE = (64, 96)


def tiny_driving() -> QyolopForDrivingPerception:
    """Random, and no norm and no head near what it is made as; it sees boxes and both masks."""
    torch.manual_seed(0)
    model = QyolopForDrivingPerception(QyolopConfig(SIZE, 4))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                module.weight.normal_(0, 0.1)
                module.bias.normal_(0, 0.1)
    return model.eval()


def save_driving(folder: Path) -> Path:
    """Write network and processor as `skipcat train` does."""
    tiny_driving().save_pretrained(folder)
    QyolopImageProcessor.for_size(SIZE).save_pretrained(folder)
    return folder


def pixels_of(count: int) -> np.ndarray:
    """Pixel values, float32 [B, 3, H, W] in [0, 1]."""
    values: np.ndarray = np.random.default_rng(count).random((count, 3, *SIZE), np.float32)
    return values
