"""GGUF files of tiny models, written by llama.cpp's own `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from tests.support.tiny_decoder import byte_tokenizer


def write_llama_gguf(
    path: Path,
    model: PreTrainedModel,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a tiny Llama in float32.

    Args:
        path: of the file.
        model: an untied Llama.
        keys: further metadata of the architecture, without its name.
        tensors: further tensors.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in (keys or {}).items():
        _add(writer, f"llama.{name}", value)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        writer.add_tensor(stored, _in_pairs(name, tensor, config).numpy())
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """One key, by the type of its value."""
    kinds: dict[type, Any] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    kinds[type(value)](name, value)


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    tokenizer = byte_tokenizer()
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words += ["ab", *(f"<{index}>" for index in range(len(words) + 1, vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def _in_pairs(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """llama.cpp rotates neighbouring numbers, so that rows of queries and keys are reordered."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = next((n for kind, n in heads.items() if f"{kind}.weight" in name), None)
    if found is None:
        return tensor
    split = tensor.view(found, 2, tensor.shape[0] // found // 2, tensor.shape[1])
    return split.swapaxes(1, 2).reshape(tensor.shape).contiguous()
