"""A trained driving network, loaded whole or refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoConfig

from pipeline.driving.network import QyolopConfig, QyolopForDrivingPerception
from pipeline.driving.preprocess import QyolopImageProcessor
from pipeline.errors import InputError
from pipeline.model.load import load_processor
from pipeline.model.loading import explaining, require_tensors, silence_transformers
from pipeline.model.numbers import require_finite_model
from pipeline.model.source import resolve_source


@dataclass(frozen=True)
class LoadedDriving:
    """A driving network in memory.

    Attributes:
        model: in evaluation mode, float32.
        processor: lays images into its input.
        kind: of its files: `folder` or `hub`.
    """

    model: QyolopForDrivingPerception
    processor: QyolopImageProcessor
    kind: str


def load_driving(name: str) -> LoadedDriving:
    """Load a driving network in float32, by hub id or folder.

    Raises:
        InputError: unknown, broken, another model, compressed already, or without processor.
    """
    source = resolve_source(name)
    silence_transformers()
    with explaining("The network cannot be loaded.", name):
        config = AutoConfig.from_pretrained(source.location)
        if not isinstance(config, QyolopConfig) or hasattr(config, "quantization_config"):
            raise InputError(
                "This is no driving network in plain numbers.",
                where=name,
                observed=config.model_type,
                expected="a folder that skipcat train wrote",
            )
        model, info = QyolopForDrivingPerception.from_pretrained(
            source.location,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused in words of ours
        )
    require_tensors("The folder does not hold the network's weights, and no others.", name, info)
    require_finite_model(model, name)
    processor = load_processor(source.location)
    size = {"height": config.image_size[0], "width": config.image_size[1]}
    if not isinstance(processor, QyolopImageProcessor) or processor.size != size:
        raise InputError(
            "The image processor is not the network's.",
            where=name,
            observed=f"{type(processor).__name__} of {getattr(processor, 'size', None)}",
            expected=f"{QyolopImageProcessor.__name__} of {size}",
            change="copy the whole folder again",
        )
    return LoadedDriving(model.eval(), processor, source.kind)
