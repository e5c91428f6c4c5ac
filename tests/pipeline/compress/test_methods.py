"""Every method by its name, on tiny models."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.checkpoint.dense import densify_
from pipeline.compress.methods import DEFAULT_EFFORT, DEFAULT_METHOD, EFFORTS, METHODS
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import parameter_count
from pipeline.compress.walk import Compressed, compress_
from tests.support.tiny_survey import TOKENS, calibrated, divergence, surveyed

KEPT = 0.6
FAMILIES = ("llama", "gemma3_text")
FACTORISING = [
    name for name, m in METHODS.items() if not (m.quantizer or m.cache_alone or m.convolutions)
]


def request(method: str, **changes: object) -> CompressRequest:
    return CompressRequest("tiny", keep_params=KEPT, method=method, **changes)  # type: ignore[arg-type]


def compressed(
    family: str, method: str, **changes: object
) -> tuple[PreTrainedModel, RankPlan, Compressed]:
    """A copy of the family's tiny model, compressed as the command would do it."""
    tiny, asked = surveyed(family), request(method, **changes)
    plan = make_plan(asked, calibrated(tiny.model, tiny.layers, tiny.survey))
    model, fit = copy.deepcopy(tiny.model), asked.resolved_method.fit
    ready = calibrated(model, tiny.layers, tiny.survey)
    result = compress_(ready, plan, dtype=torch.float32, fit=fit)
    return model, plan, result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", FACTORISING)
def test_every_factorisation_meets_its_budget_and_equals_its_dense_product(
    family: str, method: str
) -> None:
    model, plan, result = compressed(family, method)
    assert 0.9 * KEPT <= plan.kept_fraction <= KEPT
    whole = parameter_count(surveyed(family).model)
    saved = sum(g.dense_parameters - g.kept_parameters for g in plan.groups)
    assert parameter_count(model) == whole - saved
    with torch.no_grad():
        found = model(TOKENS).logits
        expected = densify_(copy.deepcopy(model))(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert set(result.modules) == {
        member for group in plan.groups if group.form != "dense" for member in group.members
    }


@pytest.mark.parametrize("method", FACTORISING)
def test_a_factorisation_shares_and_skips_only_if_it_says_so(method: str) -> None:
    _, plan, _ = compressed("llama", method)
    stated = METHODS[method]
    assert (max(len(g.members) for g in plan.groups) > 1) == stated.cat
    forms = {group.form for group in plan.groups} - {"dense"}
    assert forms == {"skip" if stated.skip else "low_rank"}


@pytest.mark.parametrize("family", FAMILIES)
def test_ours_stays_closer_to_the_original_than_every_other_factorisation(family: str) -> None:
    original = surveyed(family).model
    lost = {name: divergence(original, compressed(family, name)[0]) for name in FACTORISING}
    assert min(lost, key=lambda name: lost[name]) == DEFAULT_METHOD


def test_more_effort_reads_no_less_text() -> None:
    fast, default, most = (EFFORTS[name] for name in ("fast", DEFAULT_EFFORT, "max"))
    assert fast.windows <= default.windows <= most.windows
    assert fast.survey_windows <= default.survey_windows <= most.survey_windows
    assert all(e.survey_windows <= e.windows for e in EFFORTS.values())


def test_the_names_can_be_read_without_importing_torch() -> None:
    script = (
        "import sys, pipeline.compress.methods\n"
        "assert not {'torch', 'numpy', 'transformers', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
