"""What a Hugging Face folder reads for a token."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from pipeline.bench.traffic import CacheTensor, RebuiltKeys, StoredTensor, Traffic
from pipeline.checkpoint.modeling_cache import cache_maps, own_cache
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.errors import InputError, first_line

_PROBE_TOKENS = 4


def traffic_of_checkpoint(folder: Path) -> Traffic:
    """Count a checkpoint from the headers of its safetensors files.

    Raises:
        InputError: broken weights, or tensors missing, superfluous or misshapen.
    """
    model = Skeleton.load(folder, torch.float32).model.to("meta")
    model.tie_weights()  # the move has made two tensors of a shared one
    stored: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a handle, not a dict
                header = tensors.get_slice(name)
                kind = header.get_dtype()
                floating = "F" in kind
                shape = tuple(header.get_shape())
                stored[name] = StoredTensor(name, shape, _bits_of(kind), floating=floating)
    named = dict(_every_tensor(model))
    stored = _with_quantized_joined(stored, named)
    counted: dict[int, StoredTensor] = {}
    looked_up = _lookup_tensors(model)
    for name, tensor in stored.items():
        key = id(named[name])  # a tied head may be in the file twice, and is in memory once
        rows_only = key in looked_up
        matrix = tensor.floating and len(tensor.shape) >= 2 and not rows_only
        counted[key] = StoredTensor(
            name, tensor.shape, tensor.bits, rows_only, matrix, tensor.floating
        )
    floats = [tensor.bits for tensor in counted.values() if tensor.product]
    bits = max(floats, default=32.0)
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rebuilt = tuple(
        RebuiltKeys.of(
            (made.groups, made.heads // made.groups, made.rank, made.width),
            made.groups * made.rank * bits / 8,
            bits / 8,
        )
        for made in cache_maps(model).values()
        if made.is_rotated
    )
    cache = _cache_of_model(model, bits)
    tensors = tuple(counted.values())
    return Traffic(tensors, cache, positions, "safetensors", rebuilt, _query_width(config))


def _query_width(config: Any) -> int | None:
    """Numbers of the queries of a layer, where the configuration says so in the usual words."""
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return None
    return heads * (getattr(config, "head_dim", None) or hidden // heads)


def _with_quantized_joined(
    stored: dict[str, StoredTensor], named: dict[str, torch.Tensor]
) -> dict[str, StoredTensor]:
    """Codes, scales and zero points of each quantised matrix as that one matrix.

    PyTorch multiplies with what they stand for, in the session's type.
    """
    bits: dict[str, float] = {}
    for name, tensor in stored.items():
        owner, found, _ = name.partition(".stored.")
        if found:
            whole = f"{owner}.weight"
            bits[whole] = bits.get(whole, 0.0) + tensor.bits * math.prod(tensor.shape)
    joined = {name: tensor for name, tensor in stored.items() if ".stored." not in name}
    for name, total in bits.items():
        shape = tuple(named[name].shape)
        joined[name] = StoredTensor(name, shape, total / math.prod(shape), floating=True)
    return joined


def _every_tensor(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers under every name that they have."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _bits_of(kind: str) -> float:
    """Bits of an element, from safetensors' name of its type, such as BF16 or F8_E4M3."""
    digits = re.search(r"\d+", kind)
    return float(digits.group()) if digits else 8.0


def _lookup_tensors(model: nn.Module) -> set[int]:
    """Ids of the parameters that are embeddings and nothing else."""
    tables: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (tables if isinstance(module, nn.Embedding) else others).add(id(parameter))
    return tables - others


@torch.no_grad()
def _cache_of_model(model: PreTrainedModel, bits: float) -> tuple[CacheTensor, ...]:
    """The cache that a model on the meta device makes of a few tokens.

    Args:
        model: all of it on the meta device.
        bits: of a number in the cache.

    Raises:
        InputError: it cannot be run without weights.
    """
    # Latents of few bits are held as numbers there.
    cache: Any = own_cache(model)
    tokens = torch.zeros((1, _PROBE_TOKENS), dtype=torch.int64, device="meta")
    try:
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except Exception as error:
        first = first_line(error)
        raise InputError(
            "The size of this model's cache cannot be found.",
            where=type(model).__name__,
            observed=first,
        ) from error
    return tuple(
        CacheTensor(held.shape[1] * held.shape[3], bits, getattr(layer, "sliding_window", None))
        for layer in cache.layers
        for held in (layer.keys, layer.values)
    )
