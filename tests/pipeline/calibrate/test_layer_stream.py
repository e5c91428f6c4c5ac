from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.errors import InputError
from pipeline.model.structure import Layer, decoder_structure
from tests.support.families import FAMILIES, SLIDING_WINDOW, tiny_model

WINDOWS, LENGTH = 5, 20


def random_tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the order of float32 sums, which may differ with the size of the batch."""
    return torch.allclose(actual, expected, rtol=1e-5, atol=1e-5)


def last_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the last layer returns: the input of the final norm, in an ordinary forward pass."""
    return inputs_of(model, ["model.norm"], tokens)["model.norm"]


@torch.no_grad()
def inputs_of(
    model: PreTrainedModel, names: list[str], tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Inputs of the named modules in one ordinary forward pass over all tokens."""
    caught: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: caught.update({name: args[0]})
        )
        for name in names
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return caught


def streamed(
    model: PreTrainedModel, batch_size: int, *, measure: bool = False
) -> tuple[LayerStream, list[Layer]]:
    layers = decoder_structure(model)
    stream = LayerStream(model, layers, random_tokens(), batch_size)
    for index in range(len(layers)):
        assert stream.advance(index, measure=measure) == {} or measure
    return stream, layers


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_hidden_states_are_those_of_the_model(family: str) -> None:
    # More tokens than the sliding windows of mistral and gemma3 hold.
    assert LENGTH > 2 * SLIDING_WINDOW
    model = tiny_model(family, layers=4)
    stream, _ = streamed(model, batch_size=2)
    hidden = torch.cat(stream.hidden)
    expected = last_hidden(model, random_tokens())
    assert close(hidden, expected)
    with torch.no_grad():
        final = model(random_tokens(), output_hidden_states=True).hidden_states[-1]
        assert close(model.model.norm(hidden), final)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_forgotten_sliding_window_would_show(family: str) -> None:
    model = tiny_model(family)
    windowed = last_hidden(model, random_tokens())
    model.config.sliding_window = LENGTH
    assert (last_hidden(model, random_tokens()) - windowed).abs().max() > 1e-2


def test_each_kind_of_gemma3_layer_gets_its_own_mask_and_rotation() -> None:
    model = tiny_model("gemma3_text")
    stream = LayerStream(model, decoder_structure(model), random_tokens(), 2)
    for keywords in stream.keywords.values():
        sliding, full = keywords
        rotations = [k["position_embeddings"][0] for k in (sliding, full)]
        assert not torch.equal(*rotations)
        masks = [k["attention_mask"] for k in (sliding, full)]
        assert masks[0] is not None
        assert masks[1] is None or not torch.equal(*masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_a_full_forward_pass(family: str) -> None:
    model = tiny_model(family)
    layers = decoder_structure(model)
    members = [member for layer in layers for group in layer.groups for member in group.members]
    inputs = inputs_of(model, members, random_tokens())
    stream = LayerStream(model, layers, random_tokens(), 2)
    for index, layer in enumerate(layers):
        moments = stream.advance(index)
        assert list(moments) == [group.name for group in layer.groups]
        for group in layer.groups:
            for member in group.members:
                rows = inputs[member].reshape(WINDOWS * LENGTH, -1).double()
                assert close(moments[group.name].total, rows.T @ rows)
            assert moments[group.name].tokens == WINDOWS * LENGTH


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = tiny_model("gemma3_text")
    stream, _ = streamed(model, batch_size, measure=True)
    assert [len(h) for h in stream.hidden] == [len(t) for t in random_tokens().split(batch_size)]
    assert close(torch.cat(stream.hidden), last_hidden(model, random_tokens()))


def test_measuring_does_not_change_the_hidden_states() -> None:
    model = tiny_model("qwen2")
    measured, _ = streamed(model, 2, measure=True)
    passed, _ = streamed(model, 2, measure=False)
    assert all(torch.equal(a, b) for a, b in zip(measured.hidden, passed.hidden, strict=True))


def test_only_the_activations_of_one_layer_are_held() -> None:
    model = tiny_model("llama", layers=4)
    layers = decoder_structure(model)
    stream = LayerStream(model, layers, random_tokens(), 2)
    shapes = [hidden.shape for hidden in stream.hidden]
    for index in range(len(layers)):
        earlier = list(stream.hidden)
        contents = [hidden.clone() for hidden in earlier]
        stream.advance(index)
        assert [hidden.shape for hidden in stream.hidden] == shapes
        # The same memory holds the next layer's input: nothing is kept of the one before.
        assert all(new is old for new, old in zip(stream.hidden, earlier, strict=True))
        assert not any(
            torch.equal(new, old) for new, old in zip(stream.hidden, contents, strict=True)
        )
        assert not any(hidden.requires_grad for hidden in stream.hidden)


def test_a_layer_may_be_replaced_once_it_has_been_passed() -> None:
    model = tiny_model("llama")
    layers = decoder_structure(model)
    expected = last_hidden(model, random_tokens())
    stream = LayerStream(model, layers, random_tokens(), 2)
    for index in range(len(layers)):
        stream.advance(index)
        nn.init.zeros_(model.model.layers[index].mlp.down_proj.weight)
    assert close(torch.cat(stream.hidden), expected)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        before = model(random_tokens()).logits
        streamed(model, 2, measure=True)
        assert torch.equal(model(random_tokens()).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("model.embed_tokens", "model.layers.0.self_attn.q_proj"),
        ("model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.o_proj"),
        ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
    ],
)
def test_activations_that_are_not_finite_name_the_layer(broken: str, named: str) -> None:
    model = tiny_model("llama")
    nn.init.constant_(model.get_submodule(broken).weight, float("nan"))
    with pytest.raises(InputError, match="not finite") as caught:
        streamed(model, 2, measure=True)
    assert caught.value.details["where"] == named
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_with_positional_arguments_are_refused_and_left_intact() -> None:
    config = BertConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        is_decoder=True,
    )
    model = BertLMHeadModel(config).eval()
    layers = decoder_structure(model)
    before = model(random_tokens()).logits
    with pytest.raises(InputError, match=r"(?s)positional.*encoder\.layer\.0"):
        LayerStream(model, layers, random_tokens(), 2)
    assert torch.equal(model(random_tokens()).logits, before)
