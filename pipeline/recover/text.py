"""The windows of a recovery: read from a text, or sampled from the teacher once and kept."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.model.load import LoadedModel

# Windows are sampled side by side, and each holds a cache: this many tokens at once.
TOKENS_AT_ONCE = 1 << 15


def recovery_windows(
    spec: str, source: LoadedModel, *, count: int, length: int, seed: int, kept: Path
) -> TokenBatch:
    """Take windows from a text, or sample them and keep them for a run that is taken up again.

    Args:
        spec: as `pipeline.calibrate.text.load_tokens` takes it.
        source: the model that `self` is sampled from, and the tokenizer of any other text.
        count: number of windows.
        length: tokens in each.
        seed: decides which windows are taken, or what is sampled.
        kept: file of sampled windows; read if it exists, and written if not.

    Raises:
        InputError: no such text, or too little.
    """
    if spec != "self":
        return load_tokens(
            spec, source.tokenizer, source.model, count=count, length=length, seed=seed
        )
    if kept.exists():
        tokens = load_file(kept)["tokens"]
    else:
        tokens = _sample(source, count=count, length=length, seed=seed)
        aside = kept.with_suffix(".writing")
        save_file({"tokens": tokens}, aside)
        aside.replace(kept)
    details = {"text": f"sampled from {source.source.name}, temperature 1"}
    return TokenBatch(tokens, spec, seed, details)


def _sample(source: LoadedModel, *, count: int, length: int, seed: int) -> torch.Tensor:
    """Windows that a model generates, int64 [count, length], some at a time."""
    at_once = max(1, TOKENS_AT_ONCE // length)
    parts = [
        load_tokens(
            "self",
            source.tokenizer,
            source.model,
            count=min(at_once, count - done),
            length=length,
            seed=seed + index,
        ).tokens
        for index, done in enumerate(range(0, count, at_once))
    ]
    return torch.cat(parts)
