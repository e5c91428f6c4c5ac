"""A cache of few bits, read as numbers for as long as it is looked at."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.checkpoint.modeling_cache import LatentCache, attach_cache_maps, cache_maps
from pipeline.checkpoint.unrounded_latents import unrounded_latents


def model_in_two_bits() -> LlamaForCausalLM:
    """A random model whose keys and values are cached in 2 bits, at full rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
    entries = {
        f"model.layers.{layer}.self_attn.{name}_proj": {
            "side": side, "heads": 2, "width": 16, "groups": 1, "rank": 32, "bits": 2,
            "is_rotated": name == "k",
        }
        for layer in range(2)
        for name, side in (("k", "key"), ("v", "value"))
    }  # fmt: skip
    attach_cache_maps(model, entries)
    for made in cache_maps(model).values():
        turned = torch.linalg.qr(torch.randn(32, 32))[0]
        made.down.data[0], made.up.data[0] = turned, turned.T
        made.mean.data.zero_()
    return model


@torch.no_grad()
def test_latents_that_are_not_rounded_are_what_they_stand_for_in_any_pieces() -> None:
    model, ids = model_in_two_bits(), torch.arange(16)[None]
    rounded = model(input_ids=ids, use_cache=False).logits
    with unrounded_latents(model):
        whole, cache = model(input_ids=ids, use_cache=False).logits, LatentCache(model)
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(5, dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
    assert (rounded - whole).abs().max() > 1e-3
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, rounded)


def test_an_error_inside_leaves_the_bits_as_they_were() -> None:
    model = model_in_two_bits()
    with pytest.raises(RuntimeError), unrounded_latents(model):
        raise RuntimeError
    assert [made.bits for made in cache_maps(model).values()] == [2] * 4
