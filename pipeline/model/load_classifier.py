"""Load an image classifier and its image processor, or say why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin

from pipeline.errors import InputError
from pipeline.model.load import explaining, loading_keywords, published_dtype, refuse_incomplete
from pipeline.model.source import Source, resolve_source

Shape = tuple[int, int, int]


@dataclass
class LoadedClassifier:
    """A classifier in memory, with what makes its inputs and where it came from.

    Attributes:
        model: in evaluation mode, float32.
        processor: turns images into pixel values.
        source: its files.
        storage_dtype: the type its weights were published in.
    """

    model: PreTrainedModel
    processor: ImageProcessingMixin
    source: Source
    storage_dtype: torch.dtype

    @property
    def input_shape(self) -> Shape:
        """Channels, height and width of what the model is given."""
        return input_shape(self.model.config, self.source.name)


def load_classifier(name: str, *, trust_remote_code: bool = False) -> LoadedClassifier:
    """Load an image classifier in float32, by hub id or folder.

    Raises:
        InputError: unknown, unreachable, broken, compressed already, or without image processor.
    """
    source = resolve_source(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keywords = loading_keywords(source, trust_remote_code)
    with explaining(source):
        config = AutoConfig.from_pretrained(source.location, **keywords)
        _refuse_quantised(source, config)
        processor = load_processor(source.location, **keywords)
        model, info = AutoModelForImageClassification.from_pretrained(
            source.location,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **keywords,
        )
    refuse_incomplete(source, info)
    input_shape(config, name)
    return LoadedClassifier(model.eval(), processor, source, published_dtype(source, config))


def load_processor(location: str, **keywords: Any) -> ImageProcessingMixin:
    """The image processor of a folder or hub id.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(location, **keywords)
    except (OSError, ValueError) as error:
        raise InputError(
            "The model has no image processor.",
            where=location,
            observed=(str(error).splitlines() or [type(error).__name__])[0],
            expected="preprocessor_config.json beside config.json",
            change="save it with processor.save_pretrained(folder)",
        ) from error


def input_shape(config: Any, where: str) -> Shape:
    """Channels, height and width of a classifier's input, by its config.

    Raises:
        InputError: the config does not say.
    """
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if isinstance(size, int):
        return channels, size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return channels, int(size[0]), int(size[1])
    raise InputError(
        "The config does not say how large the model's images are.",
        where=where,
        observed=f"image_size {size}",
        expected="a number, or height and width",
    )


def _refuse_quantised(source: Source, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise InputError(
            "The model is compressed or quantised already.",
            where=source.name,
            observed=f"quant_method {method.get('quant_method')}",
            change="start from the original weights (for a skipcat checkpoint: export-dense)",
        )
