"""`genai_config.json`: what onnxruntime-genai needs to know beside the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from pipeline.export.contract import (
    GRAPH_FILE,
    LOGITS,
    PRESENT,
    TOKEN_INPUTS,
    Profile,
    cache_names,
)


def genai_config(
    config: PreTrainedConfig,
    profile: Profile,
    head_size: int,
    kv_heads: int,
    layers: int,
    context_length: int,
) -> dict[str, Any]:
    """What onnxruntime-genai needs to know beside the graph.

    The type is "decoder", its name for any plain decoder: it refuses model types it has not heard
    of. A static cache makes past and present share one buffer; so says the flag, for clarity.

    Args:
        config: of the model.
        profile: of the graph.
        head_size: numbers that a row of the cache has.
        kv_heads: rows of a token.
        layers: that have a cache.
        context_length: most tokens the graph takes.
    """
    text = config.get_text_config()
    eos = _generation_defaults(config).get("eos_token_id", text.eos_token_id)
    bos = text.bos_token_id if text.bos_token_id is not None else 0
    pad = text.pad_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    past_key, past_value = cache_names("%d")
    present_key, present_value = cache_names("%d", PRESENT)
    past = {"past_key_names": past_key, "past_value_names": past_value}
    present = {"present_key_names": present_key, "present_value_names": present_value}
    plain = {name: name for name in TOKEN_INPUTS}
    return {
        "model": {
            "type": "decoder",
            "context_length": context_length,
            "vocab_size": text.vocab_size,
            "bos_token_id": bos,
            "eos_token_id": eos if eos is not None else 0,
            "pad_token_id": pad if pad is not None else (first_eos or 0),
            "decoder": {
                "filename": GRAPH_FILE,
                "hidden_size": text.hidden_size,
                "head_size": head_size,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": layers,
                "inputs": plain | past,
                "outputs": {LOGITS: LOGITS} | present,
                "session_options": {"provider_options": []},
            },
        },
        "search": {
            "max_length": context_length,
            "past_present_share_buffer": profile.static_cache,
        },
    }


def _generation_defaults(config: PreTrainedConfig) -> dict[str, Any]:
    """generation_config.json beside the checkpoint, if there is one."""
    folder = Path(config.name_or_path)
    if not (folder / "generation_config.json").is_file():
        return {}
    return GenerationConfig.from_pretrained(folder).to_diff_dict()
