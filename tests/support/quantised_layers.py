"""Layers of codes with random numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.checkpoint.folder import save_checkpoint
from pipeline.checkpoint.install import dense_tensors, group_entries, group_tensors, install_
from pipeline.checkpoint.modeling_quantized import QuantizedEmbedding, QuantizedLinear
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks, quantize_blocks
from tests.support.tiny_decoder import LAYERS, MAX_LENGTH, VOCAB_SIZE, byte_tokenizer


def random_blocks(rows: int, columns: int, name: str, seed: int = 0) -> Blocks:
    """A normal matrix [m, n], rounded to a format."""
    weight = np.random.default_rng(seed).normal(size=(rows, columns))
    return rounded(weight.astype(np.float32), name)


def rounded(weight: np.ndarray, name: str) -> Blocks:
    """A matrix [m, n] in a format."""
    format_ = Format.parse(name)
    width = format_.width(weight.shape[1])
    return quantize_blocks(weight, format_.bits, width, zero=format_.zero)


def fill_codes_(model: nn.Module) -> None:
    """Give every matrix of codes random ones."""
    for seed, module in enumerate(list(model.modules())):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and hasattr(module, "stored"):
            held = module.stored
            blocks = random_blocks(held.rows, held.columns, held.format_name, seed)
            held.load_state_dict(blocks.stored_tensors())
            assert torch.isfinite(held.values(torch.float32)).all()
            held._held = None


# Groups of a small Llama, their form and the formats of A' and B': those that TensorRT may get.
_GROUPS: dict[tuple[str, ...], tuple[str, str | None, str]] = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): (
        "skip",
        "int4-b64-sym",
        "int8-row-sym",
    ),
    ("self_attn.o_proj",): ("dense", None, "int4-b64-sym"),
    ("mlp.gate_proj", "mlp.up_proj"): ("skip", "int8-row-sym", "int4-b64-sym"),
    ("mlp.down_proj",): ("dense", None, "int4-b64-sym"),
}
_RANK = 64
_TABLE = "int8-row-sym"


def small_llama() -> LlamaForCausalLM:
    """Random, and as narrow as blocks of 64 let it be; its head is its table."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": LAYERS}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True,
        initializer_range=0.3, **heads, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_low_bit_llama(
    folder: Path, dtype: torch.dtype = torch.float16, others: Mapping[str, str] | None = None
) -> Path:
    """A checkpoint of `small_llama`, every matrix of which is codes; its head is its table.

    Args:
        folder: to write.
        dtype: of all else.
        others: formats in place of those that TensorRT may get.
    """
    taken = others or {}
    table_format = taken.get(_TABLE, _TABLE)
    model = small_llama()
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for names, (form, down, up) in _GROUPS.items():
            members = tuple(f"model.layers.{layer}.{name}" for name in names)
            down, up = down and taken.get(down, down), taken.get(up, up)
            made = _group(model, members, form, down, up, dtype)
            entries |= made[0]
            tensors |= made[1]
    table = model.get_input_embeddings().weight
    held = rounded(table.detach().numpy(), table_format)
    entries["model.embed_tokens"] = {
        "form": "table", "rank": 1, "owner": None, "up_style": table_format,
    }  # fmt: skip
    entries["lm_head"] = entries["model.embed_tokens"] | {
        "form": "head",
        "owner": "model.embed_tokens",
    }
    tensors |= dense_tensors(("model.embed_tokens",), [len(table)], held)
    install_(model, entries, tensors)
    model.config.tie_word_embeddings = False  # it is tied by `owner`
    model.all_tied_weights_keys = {}
    save_checkpoint(model, byte_tokenizer(), entries, folder, dtype)
    return folder


def _group(
    model: nn.Module,
    members: tuple[str, ...],
    form: str,
    down: str | None,
    up: str,
    dtype: torch.dtype,
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    modules = [model.get_submodule(member) for member in members]
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    weight = np.concatenate([layer.weight.detach().numpy() for layer in layers])
    heights, columns = [layer.out_features for layer in layers], weight.shape[1]
    if form == "dense":
        entries = group_entries(members, form, min(weight.shape), None, up)
        return entries, dense_tensors(members, heights, rounded(weight, up))
    assert down is not None
    entries = group_entries(members, form, _RANK, down, up)
    mixing = random_blocks(_RANK, columns - _RANK, down)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    factors = (mixing, rounded(weight[:, :_RANK], up), order)
    return entries, group_tensors(members, heights, *factors, dtype)
