"""Rotations change no output, wherever the structure lets them through; elsewhere they say why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.compress.channel_scaling import scale_channels_
from pipeline.compress.rotation import rotate_
from pipeline.errors import InputError
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model

TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
FOLDING = [family for family in FAMILIES if family != "gemma3_text"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize("family", FOLDING)
def test_the_output_of_a_turned_model_is_what_it_was(family: str) -> None:
    model = tiny_model(family)
    before, layer = logits(model), model.model.layers[0]
    weights = [layer.self_attn.v_proj.weight, layer.mlp.down_proj.weight]
    weights += [model.model.embed_tokens.weight, model.lm_head.weight]
    were = [weight.detach().clone() for weight in weights]
    done = rotate_(model, decoder_structure(model), "all", 3)
    # float32 sums in another order.
    assert float((logits(model) - before).abs().max()) < 1e-4 * max(1, float(before.abs().max()))
    assert all(not torch.allclose(w, old) for w, old in zip(weights, were, strict=True))
    assert torch.equal(layer.input_layernorm.weight, torch.ones_like(layer.input_layernorm.weight))
    assert done.width == model.config.hidden_size


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_turned_in_every_family(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    attention = model.model.layers[1].self_attn
    value = attention.v_proj.weight.detach().clone()
    gain = model.model.norm.weight.detach().clone()
    assert rotate_(model, decoder_structure(model), "values", 0).added_parameters == 0
    assert float((logits(model) - before).abs().max()) < 1e-4 * max(1, float(before.abs().max()))
    assert not torch.allclose(attention.v_proj.weight, value)
    assert torch.equal(model.model.norm.weight, gain)


def test_a_head_that_was_the_embedding_has_a_matrix_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("smollm")
    done = rotate_(model, decoder_structure(model), "all", 0)
    assert done.added_parameters == model.lm_head.weight.numel()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert "matrix of its own" in capsys.readouterr().err


def test_a_seed_draws_one_rotation_and_other_seeds_others() -> None:
    turned = []
    for seed in (1, 1, 2):
        model = tiny_model("llama")
        rotate_(model, decoder_structure(model), "all", seed)
        turned.append(model.model.layers[0].mlp.gate_proj.weight)
    assert torch.equal(turned[0], turned[1])
    assert not torch.allclose(turned[0], turned[2])


def test_channels_of_a_turned_model_can_be_scaled() -> None:
    model = tiny_model("llama")
    before = logits(model)
    layers = decoder_structure(model)
    rotate_(model, layers, "all", 0)
    assert len(scale_channels_(model, layers, TOKENS, 0.5)) == 4
    assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_an_outlier_among_the_channels_is_spread() -> None:
    """The largest weight, over the root mean square of all of its matrix."""

    def peak(weight: torch.Tensor) -> float:
        size = weight.detach().abs()
        return float(size.max() / size.square().mean().sqrt())

    model = tiny_model("llama")
    gate = model.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        gate[:, 3] *= 30
    before = peak(gate)
    rotate_(model, decoder_structure(model), "all", 0)
    assert peak(gate) < 0.8 * before


def layer_norms() -> nn.Module:
    config = AutoConfig.for_model(
        "stablelm", vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, use_parallel_residual=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def gains_behind_matrices() -> nn.Module:
    return tiny_model("gemma3_text")


def half_precision() -> nn.Module:
    return tiny_model("llama").bfloat16()


@pytest.mark.parametrize(
    ("make", "observed"),
    [
        (layer_norms, "subtracts a mean"),
        (gains_behind_matrices, "feeds no matrix"),
        (half_precision, "held in bfloat16"),
    ],
)
def test_what_stands_in_the_way_is_said(make, observed: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    with pytest.raises(InputError, match="does not fold") as raised:
        rotate_(model, decoder_structure(model), "all", 0)
    assert observed in str(raised.value)
