from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from pipeline.calibrate.cache_ranges import _turned_pairs, cache_ranges
from pipeline.errors import InputError
from tests.support.families import tiny_model

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def keys_at(model: PreTrainedModel, first: int) -> list[torch.Tensor]:
    cache = DynamicCache()
    positions = torch.arange(first, first + IDS.shape[1])[None]
    with torch.no_grad():
        model(input_ids=IDS, position_ids=positions, past_key_values=cache)
    return [layer.keys.abs().amax((0, 2)) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_no_position_takes_a_key_beyond_its_range(family: str) -> None:
    model = tiny_model(family)
    ranges = cache_ranges(model, IDS, 200)
    exceeds = []
    for first in (0, 1, 50, 176):
        for (reach, _), keys in zip(ranges, keys_at(model, first), strict=True):
            assert bool((keys <= reach * 1.006).all())
            exceeds.append(bool((keys > 0.9 * reach).any()))
    assert any(exceeds)  # nor are they wide


def test_the_two_halves_of_a_head_are_turned_together() -> None:
    for turning in _turned_pairs(tiny_model("llama", head_dim=16), 100):
        assert turning.partner.tolist() == [[*range(8, 16), *range(8)]] * 2


def test_channels_that_are_not_turned_stand_alone() -> None:
    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=300,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            rope_parameters=rotary,
        )
    ).eval()
    for partner in _turned_pairs(model, 100)[0].partner.tolist():
        assert partner == [4, 5, 6, 7, 0, 1, 2, 3, *range(8, 32)]


def test_a_slow_pair_is_bounded_by_what_it_comes_to_and_a_fast_one_by_its_radius() -> None:
    model, length = tiny_model("llama", head_dim=16), 200
    angles = (length - 1) / 10000 ** (torch.arange(8) / 8)
    is_slow = (angles < torch.pi / 2).repeat(2)
    for turning in _turned_pairs(model, length):
        assert torch.equal(turning.is_slow, is_slow.expand(2, 16))
        found = turning.angle[:, :8][:, is_slow[:8]] * (length - 1)
        torch.testing.assert_close(found, angles[is_slow[:8]].expand(2, -1), atol=1e-4, rtol=1e-3)
    cache, less = DynamicCache(), []
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache)
    for (reach, _), layer in zip(cache_ranges(model, IDS, length), cache.layers, strict=True):
        radius = torch.hypot(layer.keys[..., :8], layer.keys[..., 8:]).amax((0, 2)).repeat(1, 2)
        torch.testing.assert_close(reach[:, ~is_slow], radius[:, ~is_slow])
        less.append(bool((reach[:, is_slow] < 0.9 * radius[:, is_slow]).any()))
    assert any(less)


@pytest.mark.parametrize("theta", [1e4, 1e7, 1e10])
def test_however_slow_a_pair_is_its_model_is_not_refused(theta: float) -> None:
    rotary = {"rope_type": "default", "rope_theta": theta}
    turnings = _turned_pairs(tiny_model("llama", head_dim=32, rope_parameters=rotary), 64)
    halves = torch.tensor([*range(16, 32), *range(16)])
    for partner in (
        turning.partner for turning in turnings
    ):  # what the length does not turn may stand alone
        assert bool(((partner == halves) | (partner == torch.arange(32))).all())
        assert partner[:, :4].tolist() == [[16, 17, 18, 19]] * 2


def test_positions_that_are_learned_are_refused() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    with pytest.raises(InputError, match="how far this model's keys reach"):
        cache_ranges(model, IDS, 60)
