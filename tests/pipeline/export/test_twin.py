"""The shrunk twin has what decides the form of the function, and is small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from pipeline.errors import InputError
from pipeline.export.twin import ORIGINAL_CONTEXT, WINDOW, make_twin


def large(kind: str, **changes: Any) -> PreTrainedConfig:
    """The config of a model that nobody would trace twice."""
    fields = {
        "vocab_size": 50_000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **{**fields, **changes})


def twin_of(config: PreTrainedConfig) -> Any:
    return make_twin(config, torch.float32, lambda model: None).model


def test_layers_of_each_kind_are_kept_with_a_short_window_and_the_heads_width() -> None:
    config = large("gemma3_text", head_dim=256, sliding_window=1024)
    model = twin_of(config)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.sliding_window == WINDOW
    assert model.config.head_dim == 256
    assert model.config.num_attention_heads // model.config.num_key_value_heads == 2
    assert sum(p.numel() for p in model.parameters()) < 5_000_000
    assert config.num_hidden_layers == 24


def test_a_scaled_context_shrinks_in_its_ratio_and_the_factors_stay() -> None:
    factors = [1.0 + i / 64 for i in range(64)]
    rotary = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": factors,
        "long_factor": factors[::-1], "original_max_position_embeddings": 4096,
    }  # fmt: skip
    config = large("phi3", rope_parameters=rotary, max_position_embeddings=131_072)
    twin = twin_of(config).config
    assert twin.rope_parameters["original_max_position_embeddings"] == ORIGINAL_CONTEXT
    assert twin.max_position_embeddings == 32 * ORIGINAL_CONTEXT
    assert twin.rope_parameters["long_factor"] == factors[::-1]


def test_positions_are_never_fewer_than_the_original_context() -> None:
    rotary = {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 65_536,
    }  # fmt: skip
    twin = twin_of(large("llama", rope_parameters=rotary)).config
    assert twin.max_position_embeddings == ORIGINAL_CONTEXT


def test_no_vector_is_left_at_its_neutral_value_and_the_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = twin_of(large("qwen2"))
    assert torch.equal(torch.rand(1), expected)
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.03, name


def test_a_model_that_does_not_shrink_is_refused_with_the_reason() -> None:
    def refuse(model: object) -> None:
        raise RuntimeError("no")

    with pytest.raises(InputError, match="no small twin") as caught:
        make_twin(large("llama", num_hidden_layers=2), torch.float32, refuse)
    assert "RuntimeError" in caught.value.details["observed"]
