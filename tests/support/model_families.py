"""Every decoder family of transformers with linear layers, tiny and random: docs/families.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.export.contract import CPU, FLOAT
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.families import randomize_vectors_
from tests.support.tiny_decoder import byte_tokenizer

WINDOW = 8
# Tokens of a scaled rotary embedding's original context.
CONTEXT = 16
_PLAIN: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    # Those of `byte_tokenizer`.
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
_BOTH = ["sliding_attention", "full_attention"]
_WINDOWS = {"sliding_window": WINDOW, "layer_types": _BOTH}
_THETA = {"rope_theta": 10000.0}
# Heads as wide as a class takes them that derives their width, and attends with all of them.
_DERIVED = {"head_dim": None, "hidden_size": 64, "num_key_value_heads": 4}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def _scaled(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, **_THETA, **more}}


def _halves(length: float) -> dict[str, list[float]]:
    """Factors of a long-rope for heads of 16."""
    return {"short_factor": [1.0] * 8, "long_factor": [1.0 + length * k for k in range(8)]}


# name -> what the table calls its features, the model type, and what its configuration has beside.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("", "llama", {}),
    "llama, biases": ("biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3": (
        "scaled angles",
        "llama",
        _scaled(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=CONTEXT,
        ),
    ),
    "llama, yarn": (
        "scaled angles",
        "llama",
        _scaled("yarn", factor=4.0, original_max_position_embeddings=CONTEXT),
    ),
    "llama, linear": ("scaled angles", "llama", _scaled("linear", factor=4.0)),
    "llama, dynamic": (
        "angles that depend on the length",
        "llama",
        {"max_position_embeddings": CONTEXT} | _scaled("dynamic", factor=4.0),
    ),
    "mistral": ("windows", "mistral", {"sliding_window": WINDOW}),
    "mistral, narrow heads": (
        "windows, heads of 20",
        "mistral",
        {"sliding_window": WINDOW, "head_dim": 20},
    ),
    "ministral": ("windows", "ministral", _WINDOWS),
    "ministral3": (
        "queries scaled by position",
        "ministral3",
        _scaled(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=CONTEXT,
            llama_4_scaling_beta=0.1,
        ),
    ),
    "qwen2": ("biases", "qwen2", {}),
    "qwen2, windows": (
        "biases, windows",
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1} | _WINDOWS,
    ),
    "qwen3": ("norms of q and k", "qwen3", {}),
    "gemma": ("gains in float32", "gemma", {}),
    "gemma2": (
        "windows, soft caps",
        "gemma2",
        {
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        }
        | _WINDOWS,
    ),
    "gemma3": (
        "windows, norms of q and k",
        "gemma3_text",
        {"query_pre_attn_scalar": 16} | _WINDOWS,
    ),
    "vaultgemma": (
        "windows, soft caps",
        "vaultgemma",
        {
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        }
        | _WINDOWS,
    ),
    "phi": ("partial rotation", "phi", _DERIVED),
    "phi, many words": (
        "partial rotation, biases of 51,200",
        "phi",
        {"vocab_size": 51200} | _DERIVED,
    ),
    "phi3": ("one matrix for q, k, v", "phi3", _DERIVED),
    "phi3, longrope": (
        "angles that depend on the length",
        "phi3",
        {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 64}
        | _DERIVED
        | _scaled("longrope", **_halves(0.5), original_max_position_embeddings=CONTEXT),
    ),
    "stablelm": ("partial rotation, biases", "stablelm", {"use_qkv_bias": True} | _DERIVED),
    "olmo": ("norms without gains, clipping", "olmo", {"clip_qkv": 2.0}),
    "olmo2": ("norms after", "olmo2", {}),
    "olmo3": ("norms after, windows", "olmo3", _WINDOWS),
    "starcoder2": ("windows, biases", "starcoder2", {"sliding_window": WINDOW} | _DERIVED),
    "cohere": ("neighbours rotated", "cohere", {}),
    "cohere, norms": ("neighbours rotated, norms of q and k", "cohere", {"use_qk_norm": True}),
    "cohere2": ("neighbours rotated, windows", "cohere2", _WINDOWS),
    "glm": ("neighbours rotated in part", "glm", {}),
    "glm4": ("neighbours rotated in part", "glm4", {}),
    "granite": (
        "multipliers",
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "granite_swa": ("windows, sinks", "granite_swa", {"sliding_window": WINDOW}),
    "smollm3": ("layers without rotation", "smollm3", {"no_rope_layers": [1, 0]}),
    "ernie4_5": ("neighbours rotated", "ernie4_5", {}),
    "exaone4": ("windows, layers without rotation", "exaone4", _WINDOWS),
    "opt": (
        "learned positions",
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "head_dim": None},
    ),
    "persimmon": ("one matrix for q, k, v", "persimmon", _DERIVED),
    "nemotron": ("partial rotation, squared ReLU", "nemotron", _DERIVED),
    "helium": ("neighbours rotated", "helium", _DERIVED | {"head_dim": 16}),
    "seed_oss": ("biases", "seed_oss", {}),
    "hunyuan": ("norms of q and k", "hunyuan_v1_dense", {}),
    "arcee": ("squared ReLU", "arcee", {}),
    "apertus": ("xIELU", "apertus", {}),
    "bitnet": ("ternary in training", "bitnet", _DERIVED),
    "internlm3": ("biases", "internlm3", {"qkv_bias": True, "bias": True}),
    "hyperclovax": ("multipliers, norms after", "hyperclovax", {}),
    "jais2": ("layer norms, biases", "jais2", {}),
    "cwm": ("windows, scaled angles", "cwm", _WINDOWS),
    "nanochat": ("norms without gains", "nanochat", {}),
    "lfm2": ("convolutions", "lfm2", {"layer_types": ["conv", "full_attention"]}),
    "lfm2, attention": ("norms of q and k", "lfm2", {"layer_types": ["full_attention"] * 2}),
    "flint": ("sinks", "flint", {}),
    "biogpt": ("learned positions", "biogpt", {}),
    "xglm": ("computed positions", "xglm", {"ffn_dim": 64, "head_dim": None}),
    "gpt_neox": ("one matrix for q, k, v", "gpt_neox", _DERIVED | {"rotary_pct": 0.25}),
    "gpt_bigcode": ("learned positions, one key head", "gpt_bigcode", {"head_dim": None}),
    "gpt_neo": (
        "windows, learned positions",
        "gpt_neo",
        {"attention_types": [[["local", "global"], 1]], "window_size": WINDOW, "head_dim": None},
    ),
    "gptj": ("neighbours rotated", "gptj", {"rotary_dim": 8} | _DERIVED),
    "codegen": ("neighbours rotated", "codegen", {"rotary_dim": 8} | _DERIVED),
    "gpt2": ("no linear layer but the head", "gpt2", {"head_dim": None}),
    "falcon": (
        "one matrix for q, k, v",
        "falcon",
        {"hidden_size": 64, "new_decoder_architecture": False, "multi_query": False},
    ),
    "falcon, grouped": (
        "one matrix for q, k, v",
        "falcon",
        {"hidden_size": 64, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "bloom": ("biases by position", "bloom", {"head_dim": None}),
    "mpt": ("biases by position", "mpt", {"max_seq_len": 256, "head_dim": None}),
    "diffllama": ("two softmaxes", "diffllama", {}),
    "doge": ("a mask of its own", "doge", {}),
    "minicpm3": (
        "latent keys and values",
        "minicpm3",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            "head_dim": None,
        },
    ),
    "mixtral": ("experts", "mixtral", _EXPERTS),
    "qwen2_moe": ("experts", "qwen2_moe", _EXPERTS),
    "qwen3_moe": ("experts", "qwen3_moe", _EXPERTS),
    "olmoe": ("experts", "olmoe", _EXPERTS | _DERIVED),
    "granitemoe": ("experts", "granitemoe", _EXPERTS),
    "gpt_oss": ("experts, windows, sinks", "gpt_oss", _EXPERTS | _WINDOWS),
    "llama4": ("experts, chunks", "llama4_text", {}),
    "mamba": ("state space", "mamba", {"state_size": 8}),
    "rwkv": ("recurrence", "rwkv", {"attention_hidden_size": 32}),
    "falcon_h1": (
        "state space beside attention",
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "olmo_hybrid": (
        "linear attention",
        "olmo_hybrid",
        {"layer_types": ["linear_attention", "full_attention"]},
    ),
}


def tiny_family(name: str) -> PreTrainedModel:
    """A random model, float32, whose every vector differs from its neutral value."""
    _, model_type, changes = FAMILIES[name]
    keywords = {k: v for k, v in (_PLAIN | changes).items() if v is not None}
    if model_type == "falcon":
        del keywords["head_dim"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **keywords)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize_vectors_(model)
    return model.eval()


def save_model(folder: Path, name: str) -> Path:
    """Write model and tokenizer as an ordinary Hugging Face folder."""
    tiny_family(name).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def exported(source: Path, folder: Path, profile: str) -> CpuSession | OnnxSession:
    """A session over an export in float32.

    Raises:
        PipelineError: the export is refused.
    """
    weights = FLOAT if profile == CPU else None
    export_folder(source, folder, ExportRequest(profile, max_length=64, weights=weights))
    return CpuSession(folder) if profile == CPU else OnnxSession(folder)


def expected_logits(source: Path, ids: np.ndarray) -> np.ndarray:
    """What transformers computes without a cache: [B, S, V]."""
    with torch.no_grad():
        model = load_checkpoint(source, dtype=torch.float32)
        logits: np.ndarray = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits


def in_pieces(session: CpuSession | OnnxSession, ids: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Logits of all tokens, fed in pieces that end at `cuts`."""
    session.reset()
    pieces = np.split(ids, cuts, axis=1)
    return np.concatenate([session.forward(piece) for piece in pieces], axis=1)
