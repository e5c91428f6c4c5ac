"""RAP as a rival: which numbers of a head it keeps, and that the others are not read."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rivals.cache_formats import ChangedCache
from benchmarks.rivals.pruned_pairs import KeptNumbers
from pipeline.compress.cache.statistics import CacheStatistics
from pipeline.model.cache_structure import cache_structure
from pipeline.model.structure import decoder_structure


def model_and_statistics() -> tuple[LlamaForCausalLM, dict[str, CacheStatistics]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
    found = {}
    for side in cache_structure(model, decoder_structure(model)):
        moment = torch.diag(torch.arange(1.0, side.numbers + 1)).double()
        none = torch.zeros(side.numbers, dtype=torch.float64)
        even = torch.eye(side.numbers).double()
        found[side.source] = CacheStatistics(moment, moment, none, even, none)
    return model, found


def test_pairs_that_turn_together_are_kept_or_left_out_together() -> None:
    model, statistics = model_and_statistics()
    kept = KeptNumbers.of(cache_structure(model, decoder_structure(model)), statistics, 0.25)
    for mask in kept.keys:
        assert torch.equal(mask[:8], mask[8:])
        assert mask.tolist() == ([0.0] * 2 + [1.0] * 6) * 2  # pairs worth least come first here
    assert all(mask.tolist() == [0.0] * 4 + [1.0] * 12 for mask in kept.values)


@torch.no_grad()
def test_what_is_left_out_is_as_if_the_model_did_not_have_it() -> None:
    model, statistics = model_and_statistics()
    kept = KeptNumbers.of(cache_structure(model, decoder_structure(model)), statistics, 0.5)
    ids = torch.arange(12)[None]
    found = model(input_ids=ids, past_key_values=ChangedCache(model.config, kept.of_layer)).logits
    for layer, keys, values in zip(model.model.layers, kept.keys, kept.values, strict=True):
        layer.self_attn.k_proj.weight.mul_(keys.repeat(2)[:, None])
        layer.self_attn.v_proj.weight.mul_(values.repeat(2)[:, None])
    torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
