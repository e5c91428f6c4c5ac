"""Compressing whole models, all six families."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.checkpoint.dense import densify_
from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.compress.plan.plan import RankPlan, uniform_plan
from pipeline.compress.walk import Compressed, compress_
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model
from tests.support.tiny_survey import calibrated

TOKENS = torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0))


def compressed(
    model: PreTrainedModel, kept: float, dtype: torch.dtype = torch.float32, **switches: bool
) -> tuple[Compressed, RankPlan]:
    layers = decoder_structure(model)
    plan = uniform_plan(layers, kept, **switches)
    return compress_(calibrated(model, layers), plan, dtype=dtype), plan


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS[:2]).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("cat", [True, False])
def test_compressed_model_equals_its_dense_product(family: str, cat: bool, skip: bool) -> None:
    model = tiny_model(family)
    result, plan = compressed(model, 0.7, cat=cat, skip=skip)
    assert any(isinstance(m, FactoredLinear) for m in model.modules())
    assert plan.kept_fraction <= 0.7
    expected = logits(densify_(copy.deepcopy(model)))
    torch.testing.assert_close(logits(result.model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    result, _ = compressed(model, 1.0)
    assert result.modules == {}
    assert all(group["reason"] == "everything is kept" for group in result.groups)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_interpolations_stay_within_two(family: str) -> None:
    result, _ = compressed(tiny_model(family), 0.6)
    largest = [g["largest_interpolation"] for g in result.groups if g["form"] == "skip"]
    assert largest
    assert max(largest) <= 2.0


def test_reported_error_is_that_of_the_layer_on_its_calibration_inputs() -> None:
    dense = tiny_model("llama")
    model = copy.deepcopy(dense)
    result, _ = compressed(model, 0.6)
    layers = decoder_structure(dense)
    stream = LayerStream(dense, layers, TOKENS)
    moment = stream.advance(0)["model.layers.0.self_attn.o_proj"].mean()
    weight = dense.get_submodule("model.layers.0.self_attn.o_proj").weight.double()
    lost = weight - model.get_submodule("model.layers.0.self_attn.o_proj").dense_weight()
    error = ((lost @ moment * lost).sum() / (weight @ moment * weight).sum()).item()
    report = next(g for g in result.groups if g["members"] == ["model.layers.0.self_attn.o_proj"])
    # The products of calibration may be in bfloat16.
    assert report["relative_error"] == pytest.approx(error, rel=2e-2)


def test_skip_keeps_more_of_the_model_than_plain_factors_of_the_same_size() -> None:
    errors = {}
    for skip in (True, False):
        result, plan = compressed(tiny_model("llama"), 0.7, skip=skip)
        assert plan.kept_fraction <= 0.7
        errors[skip] = sum(group["relative_error"] for group in result.groups)
    assert errors[True] < errors[False]


def test_biases_survive() -> None:
    dense = tiny_model("qwen2")
    bias = dense.model.layers[0].self_attn.q_proj.bias.clone()
    result, _ = compressed(dense, 0.7)
    assert torch.equal(result.model.model.layers[0].self_attn.q_proj.up.bias, bias)
    assert bias.abs().max() > 0
