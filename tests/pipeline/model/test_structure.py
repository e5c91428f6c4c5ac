from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)
from transformers.models.gemma3 import Gemma3Config, Gemma3ForConditionalGeneration

from pipeline.errors import InputError
from pipeline.model.structure import _refuse_bidirectional, decoder_structure
from tests.support.families import FAMILIES, tiny_model
from tests.support.model_families import tiny_family

PARTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def members_of(model: PreTrainedModel) -> list[set[frozenset[str]]]:
    return [
        {frozenset(group.members) for group in layer.groups} for layer in decoder_structure(model)
    ]


def expected_members(layers: int) -> list[set[frozenset[str]]]:
    return [
        {frozenset(f"model.layers.{index}.{name}" for name in part) for part in PARTS}
        for index in range(layers)
    ]


def rename_everything_(model: nn.Module, seed: int) -> dict[str, str]:
    """Give all submodules nonsense names in another order; return old -> new dotted names.

    The class of each module gets a `__getattr__` that finds a child by its old name, so that the
    forward methods work on.
    """
    rng = random.Random(seed)
    before = {id(module): name for name, module in model.named_modules()}
    for module in list(model.modules()):
        children = dict(module._modules)
        if not children or isinstance(module, nn.ModuleList):
            continue
        nonsense = {name: f"x{rng.getrandbits(40):010x}" for name in children}
        order = sorted(children, key=lambda name: nonsense[name])
        module._modules.clear()
        module._modules.update({nonsense[name]: children[name] for name in order})
        module.__class__ = renamed_class(type(module), nonsense)
    return {before[id(module)]: name for name, module in model.named_modules()}


def renamed_class(original: type[nn.Module], nonsense: dict[str, str]) -> type:
    def find(self: Any, name: str) -> Any:
        return original.__getattr__(self, nonsense.get(name, name))

    return type(original.__name__, (original,), {"__getattr__": find})


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_grouped_by_the_input_they_share(family: str) -> None:
    model = tiny_model(family)
    assert members_of(model) == expected_members(2)


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_do_not_depend_on_the_names_or_the_order_of_modules(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        logits = model(tokens).logits
        new_name = rename_everything_(model, seed=1)
        assert torch.equal(model(tokens).logits, logits)
    assert not any("proj" in name or "layers" in name for name, _ in model.named_modules())
    expected = [
        {frozenset(new_name[name] for name in group) for group in layer}
        for layer in expected_members(2)
    ]
    assert members_of(model) == expected


def test_a_group_knows_the_shapes_of_its_members() -> None:
    model = tiny_model("smollm", layers=3)
    layers = decoder_structure(model)
    assert [layer.name for layer in layers] == [f"model.layers.{i}" for i in range(3)]
    for layer in layers:
        for group in layer.groups:
            assert group.name == group.members[0]
            linears = [model.get_submodule(member) for member in group.members]
            assert {linear.in_features for linear in linears} == {group.in_features}
            assert tuple(linear.out_features for linear in linears) == group.out_features
    assert layers[0].groups[0].out_features == (48, 16, 16)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    decoder_structure(model)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_conv1d_layers_are_refused_by_name() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=272))
    with pytest.raises(InputError, match="Conv1D"):
        decoder_structure(model)


def test_gains_of_a_norm_may_be_a_matrix() -> None:
    assert len(decoder_structure(tiny_family("cohere, norms"))) == 2


def test_experts_are_refused_by_name() -> None:
    config = MixtralConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    with pytest.raises(InputError, match=r"Router|Experts"):
        decoder_structure(MixtralForCausalLM(config))


def test_a_layer_that_is_used_twice_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(InputError, match="2 calls"):
        decoder_structure(model)


def test_a_linear_that_is_never_used_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.idle = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"(?s)model\.layers\.1\.mlp\.idle.*0 calls"):
        decoder_structure(model)


def test_a_layer_fed_by_something_else_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    with pytest.raises(InputError, match=r"(?s)not fed by.*model\.layers\.1"):
        decoder_structure(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_text_part_of_a_multimodal_model_is_found() -> None:
    text = tiny_model("gemma3_text").config.to_dict()
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    layers = decoder_structure(Gemma3ForConditionalGeneration(config).eval())
    assert len(layers) == 2
    assert [len(group.members) for group in layers[0].groups] == [3, 1, 2, 1]


def bert(*, is_decoder: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=is_decoder,
    )
    return BertLMHeadModel(config).eval()


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)not causal.*BertLMHeadModel.*bert"):
        decoder_structure(bert(is_decoder=False))


def test_the_same_model_as_a_decoder_is_accepted() -> None:
    assert len(decoder_structure(bert(is_decoder=True))) == 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_causal(family: str, dtype: torch.dtype) -> None:
    _refuse_bidirectional(tiny_model(family).to(dtype))
