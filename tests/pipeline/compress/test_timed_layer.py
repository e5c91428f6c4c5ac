"""The layer that is timed has the form of the model's, narrower."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.compress.timed_layer import _narrowed


def _wide(heads: int, kv_heads: int) -> LlamaConfig:
    """Three layers of a model that is not made."""
    return LlamaConfig(
        vocab_size=300,
        hidden_size=16 * heads,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "scale"), [(64, 8, 16), (9, 3, 2), (14, 2, 4), (32, 32, 8), (4, 1, 4)]
)
def test_a_narrow_layer_has_whole_heads_in_whole_groups(
    heads: int, kv_heads: int, scale: int
) -> None:
    wide = _wide(heads, kv_heads)
    narrow = _narrowed(wide, scale)
    assert narrow.num_hidden_layers == 1
    assert narrow.num_attention_heads % narrow.num_key_value_heads == 0
    assert 1 <= narrow.num_attention_heads <= heads
    assert narrow.hidden_size % narrow.num_attention_heads == 0
    assert AutoModelForCausalLM.from_config(narrow).num_parameters() > 0
    assert wide.num_hidden_layers == 3
