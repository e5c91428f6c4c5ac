"""Original and compressed model side by side, against running each of them whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate import precision
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.calibrate.paired_stream import PairedStream
from pipeline.errors import InputError
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model

TOKENS = torch.randint(0, 256, (5, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, names: list[str]) -> dict[str, torch.Tensor]:
    """Inputs of the named linears in one ordinary forward pass, float64 [tokens, n]."""
    caught: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: caught.update({name: args[0]})
        )
        for name in names
    ]
    model(TOKENS)
    for hook in hooks:
        hook.remove()
    return {name: x.reshape(-1, x.shape[-1]).double() for name, x in caught.items()}


@torch.no_grad()
def disturb_(model: PreTrainedModel, members: tuple[str, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for member in members:
        weight = model.get_submodule(member).weight
        weight.add_(0.02 * torch.randn(weight.shape, generator=generator))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_as_long_as_no_layer_is_replaced_both_models_see_the_same(family: str) -> None:
    model = tiny_model(family)
    layers = decoder_structure(model)
    plain = LayerStream(model, layers, TOKENS, 2)
    paired = PairedStream(model, layers, TOKENS, 2)
    for index, layer in enumerate(layers):
        moments = plain.advance(index)
        paired.enter(index)
        for group in layer.groups:
            seen, drift = paired.measure(index, group.name)
            assert torch.equal(seen, moments[group.name].mean().float())
            # What is left of x - x' is the rounding of x, which is kept in bfloat16: 2^-9 of it,
            # and of one sign as often as of the other.
            assert torch.linalg.norm(drift) < 2**-9 * torch.linalg.norm(seen)
        paired.leave(index)
    for one, other in zip(paired.original.hidden, paired.compressed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_both_models_run_whole(family: str) -> None:
    original = tiny_model(family)
    model = copy.deepcopy(original)
    layers = decoder_structure(model)
    paired = PairedStream(model, layers, TOKENS, 2)
    measured = {}
    for index, layer in enumerate(layers):
        paired.enter(index)
        for place, group in enumerate(layer.groups):
            measured[group.name] = paired.measure(index, group.name)
            disturb_(model, group.members, seed=10 * index + place)
        paired.leave(index)
    x, seen = inputs_of(original, list(measured)), inputs_of(model, list(measured))
    first = next(iter(measured))
    for name, (moment, drift) in measured.items():
        count = len(seen[name])
        assert relative(moment, seen[name].T @ seen[name] / count) < 1e-5
        expected = (x[name] - seen[name]).T @ seen[name] / count
        if name == first:
            assert torch.linalg.norm(expected) == 0
        else:
            # The drift is some percent of x', and x is kept to 2^-9 of itself.
            error = torch.linalg.norm(drift - expected)
            assert error < 2**-9 * torch.linalg.norm(moment)
            assert error < 0.1 * torch.linalg.norm(expected)


def test_hidden_states_end_as_those_of_both_models() -> None:
    original = tiny_model("gemma3_text", layers=3)
    model = copy.deepcopy(original)
    layers = decoder_structure(model)
    paired = PairedStream(model, layers, TOKENS, 2)
    for index, layer in enumerate(layers):
        paired.enter(index, measure=False)
        assert paired._inputs == {}
        for place, group in enumerate(layer.groups):
            disturb_(model, group.members, seed=10 * index + place)
        paired.leave(index)
    for whole, hidden in ((original, paired.original.hidden), (model, paired.compressed)):
        expected = inputs_of(whole, ["model.norm"])["model.norm"]
        found = torch.cat(hidden).reshape(expected.shape).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_a_group_reads_is_not_kept_once_it_has_been_measured() -> None:
    model = tiny_model("llama")
    layers = decoder_structure(model)
    paired = PairedStream(model, layers, TOKENS, 2)
    paired.enter(0)
    names = [group.name for group in layers[0].groups]
    assert list(paired._inputs) == names
    assert {x.get().dtype for kept in paired._inputs.values() for x in kept} == {torch.bfloat16}
    paired.measure(0, names[1])
    assert list(paired._inputs) == [names[0], *names[2:]]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_activations_that_are_not_finite_name_the_group() -> None:
    model = tiny_model("llama")
    layers = decoder_structure(model)
    paired = PairedStream(model, layers, TOKENS, 2)
    paired.enter(0)
    nn.init.constant_(model.model.layers[0].self_attn.v_proj.weight, float("nan"))
    with pytest.raises(InputError, match="not finite") as caught:
        paired.measure(0, "model.layers.0.self_attn.o_proj")
    assert caught.value.details["where"] == "model.layers.0.self_attn.o_proj"
    assert not any(m._forward_pre_hooks for m in model.modules())
