"""Adapters change nothing until they are trained, and merging them changes nothing then."""

from __future__ import annotations

import copy
import sys
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.compress.plan.plan import uniform_plan
from pipeline.compress.walk import compress_
from pipeline.errors import MissingPackageError, PipelineError
from pipeline.model.structure import decoder_structure
from pipeline.recover import adapters
from pipeline.recover.adapters import _factor_names, attach, merge_
from pipeline.recover.recover import _largest_interpolations
from tests.support.families import FAMILIES, tiny_model
from tests.support.tiny_survey import calibrated

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))
# Sums of some tens of float32 products, in another order; the logits are of size 10.
TOLERANCE = 1e-4


def small_model(family: str = "llama", *, cat: bool = True, skip: bool = True) -> PreTrainedModel:
    model = tiny_model(family)
    layers = decoder_structure(model)
    plan = uniform_plan(layers, 0.5, cat=cat, skip=skip)
    ready = calibrated(model, layers, tokens=TOKENS)
    return compress_(ready, plan, dtype=torch.float32).model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[:2]).logits


@torch.no_grad()
def randomize_adapters_(model: nn.Module) -> None:
    """As if they had been trained, and far."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("cat", [True, False])
def test_merged_factors_give_what_the_adapters_gave(family: str, cat: bool, skip: bool) -> None:
    model = small_model(family, cat=cat, skip=skip)
    before = logits(model)
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    adapted = attach(model, 4, 8, seed=0)
    assert torch.equal(logits(adapted), before)
    randomize_adapters_(adapted)
    trained = logits(adapted)
    assert (trained - before).abs().max() > 0.1
    merged = merge_(adapted, torch.float32)
    torch.testing.assert_close(logits(merged), trained, rtol=TOLERANCE, atol=TOLERANCE)
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == shapes


def test_only_adapters_are_trained_and_only_factors_change() -> None:
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    names = set(_factor_names(model))
    adapted = attach(model, 4, 8, seed=0)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(names)
    assert all("lora_" in name for name in trained)
    randomize_adapters_(adapted)
    after = merge_(adapted, torch.float32).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in names}


def test_layers_that_share_a_latent_see_the_owners_adapter() -> None:
    model = small_model(skip=True, cat=True)
    members = [m for m in model.modules() if isinstance(m, FactoredLinear) and m.owner_reference]
    assert members
    attach(model, 4, 8, seed=0)
    for member in members:
        x = torch.randn(3, member.in_features, generator=torch.Generator().manual_seed(2))
        wrapped: Any = member.owner.down
        adapter = wrapped.lora_B["default"].weight
        before = member(x)
        (gradient,) = torch.autograd.grad(before.square().sum(), adapter)
        assert gradient.abs().max() > 0
        with torch.no_grad():
            adapter.add_(0.1)
        assert not torch.equal(member(x), before)


def test_the_shared_factor_of_a_group_has_one_adapter() -> None:
    names = _factor_names(small_model(cat=True))
    assert len(names) == len(set(names))
    downs = [name for name in names if name.endswith(".down")]
    ups = [name for name in names if name.endswith(".up")]
    # Two layers of q,k,v / o / gate,up / down: seven matrices, four inputs.
    assert (len(downs), len(ups)) == (2 * 4, 2 * 7)


def test_many_layers_are_adapted_by_their_full_names() -> None:
    """From twenty names on, peft shortens them to suffixes."""
    model = small_model()
    names = _factor_names(model)
    assert len(names) >= 20
    attach(model, 4, 8, seed=0)
    assert all(hasattr(model.get_submodule(name), "lora_A") for name in names)
    assert not hasattr(model.lm_head, "lora_A")


def test_adapting_other_layers_than_the_factors_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model()
    make = peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **kw: make(**kw | {"target_modules": ["up"]}))
    with pytest.raises(PipelineError, match="other layers"):
        attach(model, 4, 8, seed=0)


def test_the_seed_alone_decides_the_adapters() -> None:
    torch.manual_seed(5)
    model = small_model()
    first = adapters_of(copy.deepcopy(model), 0)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    again, other = adapters_of(copy.deepcopy(model), 0), adapters_of(copy.deepcopy(model), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def adapters_of(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    parameters = attach(model, 4, 8, seed).named_parameters()
    return {name: p.detach() for name, p in parameters if p.requires_grad}


def test_merging_rounds_to_the_type_on_disk() -> None:
    adapted = attach(small_model(), 4, 8, seed=0)
    randomize_adapters_(adapted)
    merged = merge_(adapted, torch.bfloat16)
    for parameter in merged.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_the_report_gets_the_largest_interpolation_of_the_merged_factors() -> None:
    model = small_model()
    factored = {n: m for n, m in model.named_modules() if isinstance(m, FactoredLinear)}
    owners = [name for name, module in factored.items() if not module.owner_reference]
    groups: list[dict[str, Any]] = [
        {"members": [name], "form": "skip", "largest_interpolation": 99.0} for name in owners
    ]
    report: dict[str, Any] = {"totals": {"largest": 99.0, "factored": 8}, "groups": groups}
    updated = _largest_interpolations(report, model)
    expected = [factored[name].down.weight.abs().max().item() for name in owners]
    assert [group["largest_interpolation"] for group in updated["groups"]] == expected
    assert updated["totals"] == {"largest": max(expected), "factored": 8}
    assert report["totals"]["largest"] == 99.0


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match="peft"):
        adapters.require_peft()
