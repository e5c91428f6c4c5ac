"""What a layer's errors cost, against running the model with that layer compressed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.calibrate.text import TokenBatch
from pipeline.compress import layer_prices as module
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.layer_prices import PricedModel, layer_prices
from pipeline.compress.methods import Fit
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.plan.rank_search import searched_plan
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import compress_
from pipeline.workers.workers import IN_PROCESS
from tests.support.elsewhere import Elsewhere
from tests.support.families import FAMILIES
from tests.support.tiny_survey import TOKENS, Surveyed, calibrated, surveyed

HELD_OUT = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))


def priced(tiny: Surveyed) -> PricedModel:
    return PricedModel(tiny.model, tiny.layers, tiny.survey, TOKENS, HELD_OUT, IN_PROCESS)


def plan_of(tiny: Surveyed, kept: float = 0.6) -> RankPlan:
    return searched_plan(tiny.layers, tiny.survey.curves, kept)


def alone(tiny: Surveyed, plan: RankPlan, layer: str) -> RankPlan:
    """The plan of one layer, with all others as they are."""
    whole = searched_plan(tiny.layers, tiny.survey.curves, 1.0)
    return replace(whole, layers=whole.layers | {layer: plan.layers[layer]})


@torch.no_grad()
def divergence(original: PreTrainedModel, other: PreTrainedModel) -> float:
    expected, found = (m(HELD_OUT).logits.double().log_softmax(-1) for m in (original, other))
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_price_is_the_kl_of_the_model_with_that_layer_compressed_alone(
    family: str, tmp_path: Path
) -> None:
    tiny = surveyed(family)
    plan = plan_of(tiny)
    before = tiny.model(TOKENS[:2]).logits
    prices = layer_prices(priced(tiny), plan, Fit(), tmp_path)
    assert torch.equal(tiny.model(TOKENS[:2]).logits, before)  # the model is as it was
    assert prices.keys() == {layer.name for layer in tiny.layers}
    for name, price in prices.items():
        model = copy.deepcopy(tiny.model)
        ready = calibrated(model, tiny.layers, tiny.survey)
        compress_(ready, alone(tiny, plan, name), dtype=torch.float32, fit=Fit())
        expected = sum(group.expected_kl or 0.0 for group in plan.layers[name])
        assert price * expected == pytest.approx(divergence(tiny.model, model), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_workers_find_the_prices_that_one_process_finds(family: str, tmp_path: Path) -> None:
    tiny, workers = surveyed(family), Elsewhere()
    plan = plan_of(tiny)
    own = layer_prices(priced(tiny), plan, Fit(), tmp_path / "own")
    there = replace(priced(tiny), workers=workers)
    assert layer_prices(there, plan, Fit(), tmp_path / "there") == own
    trials = [where for where in workers.asked if where.startswith("price of")]
    assert len(trials) == len(tiny.layers) * len(HELD_OUT)


def test_an_interrupted_measurement_goes_on_with_the_layers_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, path = surveyed("llama"), tmp_path / "prices"
    plan, fitted, calls = plan_of(tiny), module._fitted, list[str]()

    def stopping(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(arguments[1].name)  # type: ignore[attr-defined]
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fitted(*arguments)  # type: ignore[arg-type]

    undisturbed = layer_prices(priced(tiny), plan, Fit(), tmp_path / "other")
    monkeypatch.setattr(module, "_fitted", stopping)
    with pytest.raises(KeyboardInterrupt):
        layer_prices(priced(tiny), plan, Fit(), path)
    assert layer_prices(priced(tiny), plan, Fit(), path) == undisturbed
    names = [layer.name for layer in tiny.layers]
    assert calls == [*names[:2], *names[1:]]


def test_each_plan_has_prices_of_its_own(tmp_path: Path) -> None:
    tiny = surveyed("llama")
    one, other = (
        layer_prices(priced(tiny), plan_of(tiny, kept), Fit(), tmp_path) for kept in (0.5, 0.8)
    )
    assert one != other
    assert layer_prices(priced(tiny), plan_of(tiny, 0.5), Fit(), tmp_path) == one


def test_a_layer_that_stays_as_it_is_has_the_median_of_the_others(tmp_path: Path) -> None:
    tiny = surveyed("llama")
    plan = plan_of(tiny)
    whole = searched_plan(tiny.layers, tiny.survey.curves, 1.0)
    first, *others = (layer.name for layer in tiny.layers)
    kept = replace(plan, layers=plan.layers | {first: whole.layers[first]})
    prices = layer_prices(priced(tiny), kept, Fit(), tmp_path)
    assert prices[first] == pytest.approx(np.median([prices[name] for name in others]))


@pytest.mark.parametrize(
    ("effort", "method", "measured"),
    [("default", "skipcat-kl", True), ("fast", "skipcat-kl", False), ("default", "skipcat", False)],
)
def test_plans_are_priced_where_effort_and_method_say_so(
    effort: str, method: str, measured: bool, tmp_path: Path
) -> None:
    tiny = surveyed("llama")
    costs = LayerCosts(tmp_path / "survey", {})
    batch = TokenBatch(torch.cat([TOKENS, HELD_OUT]).repeat(40, 1), "test", 0)
    costs.measure(tiny.model, tiny.layers, TOKENS, CostRequest())
    expected = {stack: curve.copy() for stack, curve in costs.curves.items()}
    ready = CalibratedDecoder.at_hand(tiny.model, tiny.layers, batch, costs, surveyed=len(TOKENS))
    make_plan(CompressRequest("tiny", keep_params=0.6, effort=effort, method=method), ready)
    changed = any(not np.array_equal(costs.curves[stack], expected[stack]) for stack in expected)
    assert changed == measured
    assert (costs.folder / "prices").exists() == measured
