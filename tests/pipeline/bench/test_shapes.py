from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.bench.shapes import (
    _GROUPS,
    _SHAPES,
    Shape,
    fill_randomly_,
    find_shape,
)
from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.compress.plan.plan import rank_for_kept
from pipeline.errors import UsageError
from pipeline.model.structure import decoder_structure
from tests.support.families import tiny_model

# As the model cards and transformers count them, a tied head once.
PUBLISHED_PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    parameters = _SHAPES[name].empty_model().parameters()
    assert sum(parameter.numel() for parameter in parameters) == PUBLISHED_PARAMETERS[name]


def test_the_layer_shape_is_one_layer_of_the_whole() -> None:
    whole, layer = _SHAPES["llama-3.1-70b"], _SHAPES["llama-3.1-70b-layer"]
    assert layer == replace(whole, layers=1, vocab=layer.vocab)


@pytest.mark.parametrize("family", sorted({shape.model_type for shape in _SHAPES.values()}))
def test_groups_are_those_found_by_running_the_family(family: str) -> None:
    first = decoder_structure(tiny_model(family))[0]
    members = [tuple(m.removeprefix(f"{first.name}.") for m in g.members) for g in first.groups]
    assert members == list(_GROUPS)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_plan_from_sizes_is_the_plan_from_the_model(family: str) -> None:
    shape = tiny_shape(family)
    model = shape.empty_model()
    fill_randomly_(model, torch.float32)
    planned = [(g.members, g.rows, g.columns) for g in shape.plan(0.8).groups]
    found = [
        (group.members, sum(group.out_features), group.in_features)
        for layer in decoder_structure(model)
        for group in layer.groups
    ]
    assert planned == found


def test_factors_have_the_rank_of_the_formula_and_keep_no_more_than_asked() -> None:
    shape = tiny_shape("qwen3")
    dense, kept = shape.empty_model(), shape.empty_model(0.6)
    down = kept.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, FactoredLinear)
    assert down.rank == rank_for_kept("skip", shape.hidden, shape.intermediate, 0.6)
    sizes = [
        sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
        for model in (dense, kept)
    ]
    assert 0.55 < sizes[1] / sizes[0] <= 0.6


def test_random_weights_are_the_same_each_time_and_run() -> None:
    outputs = []
    for _ in range(2):
        model = tiny_shape("llama").empty_model(0.8)
        fill_randomly_(model, torch.float32)
        with torch.inference_mode():
            outputs.append(model(torch.arange(6)[None]).logits)
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()
    assert outputs[0].std() > 0


def test_a_tied_head_stays_the_embedding() -> None:
    model = tiny_shape("llama").empty_model()
    fill_randomly_(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_an_unknown_shape_and_a_kept_fraction_of_zero_are_refused() -> None:
    with pytest.raises(UsageError, match="no such shape"):
        find_shape("gpt-5")
    with pytest.raises(UsageError, match="out of range"):
        _SHAPES["qwen3-8b"].plan(0.0)


def tiny_shape(family: str) -> Shape:
    return Shape(family, 64, 96, 2, 4, 2, 16, 128, True, 256)
