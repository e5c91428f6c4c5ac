"""What a decoder caches is found by running it, whatever its modules are called."""

from __future__ import annotations

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from pipeline.errors import InputError
from pipeline.model.cache_structure import cache_structure, tokens_of
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_that_give_keys_and_values_are_found(family: str) -> None:
    model = tiny_model(family)
    structure = cache_structure(model, decoder_structure(model))
    keys = "k_norm" if family in ("qwen3", "gemma3_text") else "k_proj"
    assert [side.source.rpartition(".")[2] for side in structure] == [keys, "v_proj"] * 2
    assert [side.is_rotated for side in structure] == [True, False] * 2
    config = model.config
    assert {side.heads for side in structure} == {config.num_key_value_heads}


def test_keys_and_values_of_one_product_are_refused() -> None:
    config = Phi3Config(
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    with pytest.raises(InputError, match="not known what this model caches"):
        cache_structure(model, decoder_structure(model))


def test_tokens_are_read_whatever_axis_the_heads_are_on() -> None:
    flat = torch.arange(2 * 7 * 12).view(2, 7, 12)
    by_token = flat.unflatten(-1, (3, 4))
    for output in (flat, by_token, by_token.transpose(1, 2)):
        found = tokens_of(output, 3, 4)
        assert found is not None
        assert torch.equal(found, flat)
    assert tokens_of(flat, 5, 4) is None
