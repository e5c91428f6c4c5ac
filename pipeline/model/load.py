"""Load a decoder language model and its tokenizer, or say why not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from pipeline.errors import InputError
from pipeline.model.source import Source, resolve_source


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


def load_model(
    name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model by alias, hub id, folder or GGUF file.

    Args:
        name: see `pipeline.model.source`.
        dtype: what the weights are held in.
        trust_remote_code: let Python code that comes with the model run.

    Raises:
        InputError: unknown, unreachable, broken or not a decoder language model.
    """
    source = resolve_source(name)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    keywords: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.gguf_file:
        keywords["gguf_file"] = source.gguf_file
    try:
        config = AutoConfig.from_pretrained(source.location, **keywords)
        published = _published_dtype(source, config)
        refuse_unsupported(source, config)
        with _quiet_gguf():
            model, info = AutoModelForCausalLM.from_pretrained(
                source.location,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **keywords,
            )
        tokenizer = AutoTokenizer.from_pretrained(source.location, **keywords)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise _explained(source, error) from error
    _refuse_incomplete(source, info)
    _forget_gguf(model)
    model.published_dtype = published
    return LoadedModel(model.eval(), tokenizer, source)


@contextmanager
def _quiet_gguf() -> Iterator[None]:
    """Silence the one progress bar that transformers' own switch does not reach."""
    bar = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar


def refuse_unsupported(source: Source, config: Any) -> None:
    """Raise InputError for a model that is no plain decoder, or is quantised already."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            "Only decoder language models are supported.",
            where=source.name,
            observed=f"{config.model_type}, an encoder-decoder",
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and source.kind != "gguf":
        method = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise InputError(
            "The model is compressed or quantised already.",
            where=source.name,
            observed=f"quant_method {method.get('quant_method')}",
            change="start from the original weights (for a skipcat checkpoint: export-dense)",
        )


def _published_dtype(source: Source, config: Any) -> torch.dtype:
    if source.kind == "gguf":
        return torch.float16
    declared = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, declared) if isinstance(declared, str) else declared


def _explained(source: Source, error: Exception) -> InputError:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    change = None
    if "trust_remote_code" in str(error):
        change = "read the model's code, then pass --trust-remote-code if you trust it"
    elif source.kind == "hub":
        change = "check the id and the network, or pass a local folder"
    return InputError(
        "The model could not be loaded.", where=source.location, observed=first, change=change
    )


def _refuse_incomplete(source: Source, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(entry) for entry in info["mismatched_keys"])
    if missing or mismatched:
        bad = missing + mismatched
        raise InputError(
            "The checkpoint does not hold all weights of its architecture.",
            where=source.location,
            observed=f"{len(bad)} missing or of another shape: {', '.join(bad[:4])}",
        )


def _forget_gguf(model: PreTrainedModel) -> None:
    """Drop the marks of a dequantised GGUF, which would make save_pretrained refuse."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = False
