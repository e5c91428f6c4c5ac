"""Tiny random image classifiers of each supported family, and a ViT trained on digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from tests.support.families import randomize_vectors_

CLASSES = 10
PLAIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # TensorRT fuses attention of heads from 16 on
    "intermediate_size": 64,
    "num_labels": CLASSES,
    "initializer_range": 0.2,
}
# Two stages: windows of 4 x 4, shifted in every second block, and one merging of patches.
SWIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 32,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": CLASSES,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "vit": (ViTForImageClassification, ViTConfig, PLAIN),
    "deit": (DeiTForImageClassificationWithTeacher, DeiTConfig, PLAIN),
    "deit-student": (DeiTForImageClassification, DeiTConfig, PLAIN),
    "swin": (SwinForImageClassification, SwinConfig, SWIN),
}


def tiny_classifier(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model, float32, whose every kind of parameter differs from its neutral value."""
    model_class, config_class, keywords = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**keywords | changes))
    randomize_vectors_(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name or "token" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def processor(size: int, channels: int = 3) -> ViTImageProcessorPil:
    """What scales 8-bit images to the model's size and to [-1, 1]."""
    half = [0.5] * channels
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=half, image_std=half
    )


def save_classifier(folder: Path, family: str, **changes: Any) -> Path:
    """Write model and image processor as an ordinary Hugging Face folder."""
    model = tiny_classifier(family, **changes)
    model.save_pretrained(folder)
    processor(model.config.image_size, model.config.num_channels).save_pretrained(folder)
    return folder


def write_images(path: Path, count: int = 64, size: int = 20, seed: int = 1) -> Path:
    """An .npz of random colour images with labels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=generator.integers(0, CLASSES, count))
    return path
