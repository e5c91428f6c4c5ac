"""A tiny random decoder of each supported family, in memory and as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny_decoder import byte_tokenizer

# Names by which transformers finds the configuration; smollm is a Llama of another shape.
MODEL_TYPES = {"smollm": "llama"}
SLIDING_WINDOW = 8
# What each family has that Llama does not.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW, "head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma3_text": {
        "sliding_window": SLIDING_WINDOW,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    },
    "smollm": {
        "tie_word_embeddings": True,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}


def tiny_model(
    family: str, seed: int = 0, layers: int = 2, vocab_size: int = 272, **changes: Any
) -> PreTrainedModel:
    """A random model, float32, whose every kind of parameter differs from its neutral value.

    `changes` go into the configuration.

    Biases and norm gains are random too: initialised to 0 and 1 they would hide a forgotten bias or
    gain. The logits are far from flat, so that an error shows in them.
    """
    keywords: dict[str, Any] = (
        {
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            # Those of `byte_tokenizer`.
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 257,
        }
        | FAMILIES[family]
        | changes
    )
    if family == "gemma3_text":
        kinds = ("sliding_attention", "full_attention")
        keywords["layer_types"] = [kinds[index % 2] for index in range(layers)]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(MODEL_TYPES.get(family, family), **keywords)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_vectors_(model)
    return model.eval()


@torch.no_grad()
def randomize_vectors_(model: nn.Module) -> None:
    """Move biases away from 0 and norm gains away from their neutral value."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))


def save_family(folder: Path, family: str, **changes: Any) -> Path:
    """Write model and tokenizer as an ordinary Hugging Face folder; `changes` as above."""
    tiny_model(family, **changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
