"""Load a language model or an image classifier, and what makes its inputs, or say why not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.image_processing_base import ImageProcessingMixin

from pipeline.errors import InputError, UsageError, first_line
from pipeline.model.check import check_config
from pipeline.model.gguf import check_gguf, read_gguf
from pipeline.model.loading import (
    empty_model,
    explaining,
    require_tensors,
    settle_ties,
    silence_transformers,
)
from pipeline.model.numbers import require_finite_model
from pipeline.model.quick_gguf import quick_gguf
from pipeline.model.source import Source, resolve_source
from pipeline.model.structure import refuse_other_architectures
from pipeline.model.task import (
    TASKS,
    TEXT,
    know_own_classes,
    refuse_other_tasks,
    task_of_config,
)
from pipeline.model.tokenizer_file import following_tokenizer
from pipeline.progress import note


@dataclass
class LoadedModel:
    """A model in memory, with where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source

    @property
    def storage_dtype(self) -> torch.dtype:
        """The type its weights were published in; float16 for GGUF, which names none."""
        return getattr(self.model, "published_dtype", torch.float32)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: those that the model lists, else the tokenizer's."""
        settings = self.model.generation_config
        listed = settings.eos_token_id if settings else None
        listed = self.tokenizer.eos_token_id if listed is None else listed
        ids = listed if isinstance(listed, list) else [listed]
        return frozenset(token for token in ids if token is not None)


@dataclass
class _Preview:
    """What a model is, without its weights."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    source: Source
    parameters: int


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = torch.float32,
    stream_weights: bool = False,
    trust_remote_code: bool = False,
    window_length: int = 0,
) -> LoadedModel:
    """Load a causal language model by alias, hub id, folder or GGUF file.

    Args:
        name: see `pipeline.model.source`.
        dtype: what the weights are held in; None for float32 if memory has room for it, and as
            they are published if not: they then stay in their files until they are used.
        stream_weights: with `dtype` None, leave them there even if memory has room; not for GGUF.
        trust_remote_code: let Python code that comes with the model run.
        window_length: tokens that it will be run on at once.

    Raises:
        InputError: unknown, unreachable, broken or not a decoder language model.
        UsageError: `window_length` is beyond its positions; found before its weights are read.
    """
    preview = preview_model(name, trust_remote_code=trust_remote_code)
    source = preview.source
    refuse_long_windows("--window-length", window_length, preview.config)
    if dtype is None:
        dtype = _held_dtype(preview, stream_weights)
    with _explaining(source), _quiet_gguf(), quick_gguf():
        model, info = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=preview.config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused in words of ours
            **_loading_keywords(source, trust_remote_code),
        )
    _refuse_incomplete(source, info)
    settle_ties(model, source.name)
    _forget_gguf(model)
    require_finite_model(model, source.location)
    model.published_dtype = _published_dtype(source, preview.config)
    return LoadedModel(model.eval(), preview.tokenizer, source)


def _held_dtype(preview: _Preview, stream_weights: bool) -> torch.dtype:
    """float32, or the published type: when asked, or float32 would fill half of the free memory."""
    published = _published_dtype(preview.source, preview.config)
    if preview.source.kind == "gguf":
        return torch.float32
    needed_bytes = 4 * preview.parameters
    free_bytes = psutil.virtual_memory().available
    if needed_bytes <= free_bytes / 2 and not stream_weights:
        return torch.float32
    note(
        f"weights stay in their files, in {str(published).removeprefix('torch.')}: "
        f"float32 would take {needed_bytes / 1e9:.1f} of {free_bytes / 1e9:.1f} GB of memory"
    )
    return published


def preview_model(name: str, *, trust_remote_code: bool = False) -> _Preview:
    """Read all of a model but its weights, and refuse what its config says is not supported.

    Raises:
        InputError: as `load_model`.
    """
    source = resolve_source(name)
    silence_transformers()
    know_own_classes()
    keywords = _loading_keywords(source, trust_remote_code)
    with _explaining(source), quick_gguf():
        if source.gguf_file:
            check_gguf(Path(source.location) / source.gguf_file)
        config = AutoConfig.from_pretrained(source.location, **keywords)
        _refuse_unsupported(source, config)
        model = empty_model(TASKS[TEXT].auto_class, config, trust_remote_code)
        refuse_other_architectures(model, source.name)
        if source.gguf_file:
            read_gguf(Path(source.location) / source.gguf_file, config, model)
        tokenizer = following_tokenizer(source.location, source.folder(), **keywords)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return _Preview(config, tokenizer, source, parameters)


def _loading_keywords(source: Source, trust_remote_code: bool) -> dict[str, Any]:
    """What transformers' from_pretrained is given for a source."""
    keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    return keywords | ({"gguf_file": source.gguf_file} if source.gguf_file else {})


def _explaining(source: Source) -> AbstractContextManager[None]:
    """Turn whatever transformers raises into an InputError that says what to change."""
    change = "check the id and the network, or pass a local folder"
    return explaining(
        "The model could not be loaded.",
        source.location,
        change if source.kind == "hub" else None,
    )


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Silence the one progress bar that transformers' own switch does not reach."""
    bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar


def _refuse_unsupported(source: Source, config: Any) -> None:
    """Raise InputError for a model that is no plain decoder, or is quantised already."""
    refuse_other_tasks(task_of_config(config), source.name, f"{config.model_type}, ")
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            "Only decoder language models are supported.",
            where=source.name,
            observed=f"{config.model_type}, an encoder-decoder",
        )
    if source.kind != "gguf":
        _refuse_compressed(source, config)


def refuse_long_windows(flag: str, length: int, config: Any) -> None:
    """Raise UsageError for windows of more tokens than the model has positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UsageError(
            "The windows are longer than the model's context.",
            where=flag,
            observed=f"{length} tokens",
            expected=f"at most {positions}",
        )


def _published_dtype(source: Source, config: Any) -> torch.dtype:
    """The type that the weights are in on disk; float16 for GGUF, which names none."""
    if source.kind == "gguf":
        return torch.float16
    declared = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, declared) if isinstance(declared, str) else declared


def _refuse_incomplete(source: Source, info: dict[str, Any]) -> None:
    """Raise InputError when transformers found tensors missing, superfluous or of another shape."""
    require_tensors(
        "The checkpoint does not hold all weights of its architecture, and no others.",
        source.location,
        info,
    )


def _forget_gguf(model: PreTrainedModel) -> None:
    """Drop the marks of a dequantised GGUF, which would make save_pretrained refuse."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = False


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
    silence_transformers()
    keywords = _loading_keywords(source, trust_remote_code)
    with _explaining(source):
        config = AutoConfig.from_pretrained(source.location, **keywords)
        _refuse_compressed(source, config)
        processor = load_processor(source.location, **keywords)
        model, info = AutoModelForImageClassification.from_pretrained(
            source.location,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be refused in words of ours
            **keywords,
        )
    _refuse_incomplete(source, info)
    require_finite_model(model, source.location)
    input_shape(config, name)
    return LoadedClassifier(model.eval(), processor, source, _published_dtype(source, config))


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
            observed=first_line(error),
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


def _refuse_compressed(source: Source, config: Any) -> None:
    """Raise InputError for a model that is compressed, or quantised by any tool, already."""
    check_config(config.to_dict(), source.name)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            "The model is compressed or quantised already.",
            where=source.name,
            observed="quant_method skipcat",
            change="start from the original weights (for a skipcat checkpoint: export-dense)",
        )
