"""One group of a tiny model, fitted in every way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.calibrate.layer_stream import LayerStream
from pipeline.compress.factorize.factors import Form
from pipeline.compress.factorize.whitened_svd import InputMoments, _propagated_target
from pipeline.compress.fit_group import fit_group
from pipeline.compress.methods import _RECONSTRUCTED, ONE_SIDED, Fit
from pipeline.compress.plan.plan import GroupPlan
from pipeline.errors import InputError
from tests.support.tiny_survey import TOKENS, surveyed

QKV = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
ROWS, COLUMNS = 64, 32
MPIFA = Fit(two_sided=False, mix=0.25, factorize=_RECONSTRUCTED)


def weights() -> list[torch.Tensor]:
    model = surveyed("llama").model
    return [model.get_submodule(member).weight.detach() for member in QKV]


def weight() -> torch.Tensor:
    return torch.cat(weights()).double()


@pytest.fixture(scope="module")
def inputs() -> InputMoments:
    """Of the first layer's q, k and v; a drift as if 5% of every input had been lost."""
    tiny = surveyed("llama")
    moment = LayerStream(tiny.model, tiny.layers, TOKENS).advance(0)[QKV[0]].mean()
    return InputMoments(moment, 0.05 * moment)


def fitted(
    inputs: InputMoments,
    fit: Fit,
    rank: int,
    form: Form = "skip",
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, torch.Tensor], dict]:
    tiny = surveyed("llama")
    group = GroupPlan(QKV, ROWS, COLUMNS, form, rank, expected_kl=0.25)
    found = fit_group(group, weights(), inputs, tiny.survey.of(QKV), fit, dtype)
    return found.tensors, found.report


def product(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """B A of the stored tensors."""
    up = torch.cat([tensors[f"{member}.up.weight"] for member in QKV])
    down = tensors[f"{QKV[0]}.down.weight"]
    if f"{QKV[0]}.permutation" not in tensors:
        return up @ down
    order = tensors[f"{QKV[0]}.permutation"].long()
    whole = torch.empty(ROWS, COLUMNS, dtype=up.dtype)
    whole[:, order] = torch.cat([up, up @ down], dim=1)
    return whole


def output_error(target: torch.Tensor, found: torch.Tensor, moment: torch.Tensor) -> float:
    lost = target - found
    return float((lost @ moment * lost).sum() / (target @ moment * target).sum())


@pytest.mark.parametrize("fit", [ONE_SIDED, Fit(), Fit(mix=0.5), MPIFA])
@pytest.mark.parametrize("form", ["skip", "low_rank"])
def test_full_rank_gives_the_target_back(fit: Fit, form: Form, inputs: InputMoments) -> None:
    target = weight()
    if fit.mix is None:
        inputs = InputMoments(inputs.seen)
    else:
        assert inputs.drift is not None
        target = _propagated_target(target, inputs.seen, inputs.drift, fit.mix)
    tensors, report = fitted(inputs, fit, COLUMNS, form)
    torch.testing.assert_close(product(tensors), target, rtol=0, atol=1e-6)
    assert report["relative_error"] < 1e-10


@pytest.mark.parametrize("fit", [ONE_SIDED, Fit(), Fit(mix=0.5), MPIFA])
def test_the_reported_error_is_that_of_the_stored_product(fit: Fit, inputs: InputMoments) -> None:
    target = weight()
    if fit.mix is None:
        inputs = InputMoments(inputs.seen)
    else:
        assert inputs.drift is not None
        target = _propagated_target(target, inputs.seen, inputs.drift, fit.mix)
    tensors, report = fitted(inputs, fit, 12)
    expected = output_error(target, product(tensors), inputs.seen)
    assert report["relative_error"] == pytest.approx(expected, rel=1e-6)
    assert report["largest_interpolation"] <= 2.0
    assert {report[key] for key in ("form", "rank", "expected_kl")} == {"skip", 12, 0.25}


def test_two_sided_gives_up_output_error_for_what_the_model_minds(inputs: InputMoments) -> None:
    survey = surveyed("llama").survey
    inputs = InputMoments(inputs.seen)
    geometry = survey.of(QKV).geometry(inputs.seen).double()
    sensitivity = torch.block_diag(*(part.double() for part in survey.of(QKV).sensitivities()))
    minded, lost = {}, {}
    for fit in (ONE_SIDED, Fit()):
        tensors, report = fitted(inputs, fit, 12)
        error = weight() - product(tensors)
        minded[fit.two_sided] = float(torch.trace(sensitivity @ error @ geometry @ error.T))
        lost[fit.two_sided] = report["relative_error"]
    assert minded[True] < minded[False]
    assert lost[True] > lost[False]


def test_the_survey_is_not_needed_for_a_one_sided_fit(inputs: InputMoments) -> None:
    group = GroupPlan(QKV, ROWS, COLUMNS, "skip", 12)
    seen = InputMoments(inputs.seen)
    alone = fit_group(group, weights(), seen, None, ONE_SIDED, torch.float32).tensors
    beside, _ = fitted(InputMoments(inputs.seen), ONE_SIDED, 12, dtype=torch.float32)
    assert alone.keys() == beside.keys()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_have_the_type_that_is_stored(dtype: torch.dtype, inputs: InputMoments) -> None:
    tensors, _ = fitted(InputMoments(inputs.seen), Fit(), 12, dtype=dtype)
    assert {t.dtype for name, t in tensors.items() if "permutation" not in name} == {dtype}
    assert tensors[f"{QKV[0]}.permutation"].dtype == torch.int32


def with_nan(inputs: InputMoments) -> InputMoments:
    return InputMoments(inputs.seen * torch.nan, inputs.drift)


def with_drift_of_nan(inputs: InputMoments) -> InputMoments:
    assert inputs.drift is not None
    return InputMoments(inputs.seen, inputs.drift * torch.nan)


def with_nothing(inputs: InputMoments) -> InputMoments:
    return InputMoments(torch.zeros_like(inputs.seen), inputs.drift)


@pytest.mark.parametrize(
    ("fit", "spoil", "observed"),
    [
        (ONE_SIDED, with_nothing, "never reaches"),
        (ONE_SIDED, with_nan, "NaN"),
        (Fit(), with_nan, "NaN"),
        (Fit(mix=0.5), with_drift_of_nan, "NaN"),
        (MPIFA, with_nan, "NaN"),
    ],
)
def test_moments_that_cannot_be_used_name_the_group(
    fit: Fit, spoil: Callable[[InputMoments], InputMoments], observed: str, inputs: InputMoments
) -> None:
    with pytest.raises(InputError, match="cannot be factored") as caught:
        fitted(spoil(inputs), fit, 12)
    assert caught.value.details["where"] == ", ".join(QKV)
    assert observed in caught.value.details["observed"]
