"""From a request to its plan."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pipeline.calibrate.text import TokenBatch
from pipeline.compress.methods import METHODS
from pipeline.compress.plan import make_plan as make_plan_module
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import uniform_plan
from pipeline.compress.request import CompressRequest
from pipeline.quantize.formats import Format
from tests.support.tiny_survey import calibrated, surveyed


@pytest.mark.parametrize("count", [1, 2, 5, 12, 40])
def test_windows_are_spread_evenly_with_both_ends(count: int) -> None:
    tokens = torch.arange(12)[:, None]
    chosen = TokenBatch(tokens, "test", 0).spread(count)[:, 0].tolist()
    assert len(set(chosen)) == len(chosen) == min(count, 12)
    assert chosen[0] == 0
    if count > 1:
        assert chosen[-1] == 11
        gaps = [b - a for a, b in pairwise(chosen)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [1, 2, 5, 11])
@pytest.mark.parametrize("most", [1, 3, 40])
def test_windows_that_are_held_out_are_none_of_those(count: int, most: int) -> None:
    batch = TokenBatch(torch.arange(12)[:, None], "test", 0)
    held_out = set(batch.apart_from(count, most)[:, 0].tolist())
    assert len(held_out) == min(most, 12 - count)
    assert not held_out & set(batch.spread(count)[:, 0].tolist())


def test_where_all_windows_are_taken_the_same_are_held_out() -> None:
    batch = TokenBatch(torch.arange(12)[:, None], "test", 0)
    assert batch.apart_from(12, 4)[:, 0].tolist() == batch.spread(4)[:, 0].tolist()


def test_what_an_embedding_is_measured_to_cost_counts_as_so_much_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dearer weights are for each expected nat, the fewer bytes are left for the embedding."""
    tiny = surveyed("llama")
    request = CompressRequest("tiny", keep_bytes=0.3, runtime="any", effort="fast")
    chosen = []
    for price in (1e-6, 1e6):
        monkeypatch.setattr(make_plan_module, "_WEIGHTS_PRICE", price)
        survey = LayerCosts(tmp_path / "survey", {})
        ready = calibrated(tiny.model, tiny.layers, survey)
        chosen.append(make_plan(request, ready).embeddings["model.embed_tokens"])
    few, many = (Format.parse(name).bits for name in reversed(chosen))
    assert few < many


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_is_the_plan_that_changes_nothing(method: str) -> None:
    tiny = surveyed("llama")
    request = CompressRequest("tiny", keep_params=1.0, method=method)
    plan = make_plan(request, calibrated(tiny.model, tiny.layers, tiny.survey))
    assert {group.form for group in plan.groups} == {"dense"}
    assert plan.kept_fraction == 1


def test_a_plan_that_is_given_is_followed_and_measured_for(tmp_path: Path) -> None:
    tiny = surveyed("llama")
    path = tmp_path / "plan.json"
    given = uniform_plan(tiny.layers, 0.5)
    given.save(path)
    request = CompressRequest("tiny", plan=str(path))
    # Its factors are fitted two-sided, which needs the sensitivities.
    survey = LayerCosts(tmp_path / "survey", {})
    ready = calibrated(tiny.model, tiny.layers, survey)
    assert make_plan(request, ready) == given
    ready.measure(request)
    assert survey.curves.keys() == tiny.survey.curves.keys()
    assert make_plan(request, calibrated(tiny.model, tiny.layers)) == given


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if not m.needs_costs])
def test_a_method_that_needs_no_gradients_takes_none(method: str, tmp_path: Path) -> None:
    tiny = surveyed("llama")
    survey = LayerCosts(tmp_path, {})
    request = CompressRequest("tiny", method=method)
    ready = calibrated(tiny.model, tiny.layers, survey)
    make_plan(request, ready)
    ready.measure(request)
    assert survey.curves == {}
