"""The step that whole models are timed by is that of transformers' own Llama and Qwen3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu.decoder import Decoder, Way, _Dense
from pipeline.bench.shapes import Shape

LLAMA = Shape("llama", 64, 96, 3, 4, 2, 16, 80, True, 64)
WAYS = (Way("dense"), Way("skip", 0.6, "skip"), Way("low", 0.6, "low_rank"), Way("int4", bits=4))
PLACES = 9


def filled(shape: Shape) -> tuple[Decoder, Any]:
    """A decoder of dense weights with an empty cache, and transformers' model of the same ones."""
    decoder = Decoder(shape, Way("dense"), "cpu", PLACES, 3, 16)
    model: Any = shape.empty_model().to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(shape.config())
    for parameter in model.parameters():  # gains
        torch.nn.init.ones_(parameter)
    inner, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    model.get_input_embeddings().weight.copy_(decoder.embedding)
    head = decoder.head.weight if isinstance(decoder.head, _Dense) else decoder.embedding
    model.lm_head.weight.copy_(head)
    for ours, theirs in zip(decoder.layers, model.model.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        products = (ours.qkv, ours.o, ours.gate_up, ours.down)
        weights: list[Any] = [product.weight for product in products]
        parts = [*weights[0].split([inner, kv, kv]), weights[1], *weights[2].chunk(2), weights[3]]
        layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        for layer, weight in zip(
            (*layers, mlp.gate_proj, mlp.up_proj, mlp.down_proj), parts, strict=True
        ):
            layer.weight.copy_(weight)
    return decoder, model


@pytest.mark.parametrize(
    "shape", [LLAMA, replace(LLAMA, model_type="qwen3", tied=False)], ids=["llama", "qwen3"]
)
def test_token_by_token_it_says_what_transformers_says(shape: Shape) -> None:
    ids = torch.tensor([[5, 70, 2, 33, 33, 8]])
    with torch.inference_mode():
        decoder, model = filled(shape)
        expected = model(ids).logits[0]
        for token, row in zip(ids[0], expected, strict=True):
            decoder.token.fill_(token)
            torch.testing.assert_close(decoder.step()[0], row, rtol=0, atol=1e-4)
    assert int(decoder.place) == ids.shape[1]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_all_layers_are_compiled_as_one_and_say_the_same(way: Way) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder = Decoder(LLAMA, way, "cpu", PLACES, 1, 16)
    with torch.inference_mode():
        expected = decoder.step().clone()
        decoder.compile_("eager")
        for _ in range(2):
            decoder.place.zero_()
            torch.testing.assert_close(decoder.step(), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_bytes_are_those_of_the_weights_and_of_the_cache_up_to_the_place() -> None:
    # Numbers of float32: three layers of q, k, v, o and the MLP and two gains, and the head.
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64
    weights = 4 * (3 * layer + 80 * 64)
    cache = 4 * 3 * 2 * 5 * 32
    assert Decoder(LLAMA, WAYS[0], "cpu", PLACES, 1, 16).read_bytes(5) == weights + cache
    few = Decoder(LLAMA, WAYS[3], "cpu", PLACES, 1, 16).read_bytes(5)
    assert few < weights / 4 + cache
