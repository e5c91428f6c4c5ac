"""Targets for layers whose inputs have drifted, against least squares on explicit data."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pipeline.compress.factorize.whitened_svd import (
    Spectrum,
    _propagated_target,
    _reconstructed_factors,
)
from pipeline.compress.methods import Fit
from pipeline.compress.plan.rank_search import searched_plan
from pipeline.compress.walk import compress_
from tests.support.families import FAMILIES
from tests.support.tiny_survey import calibrated, divergence, surveyed

ROWS, WIDTH, COUNT = 9, 12, 80


def drifted(
    seed: int = 0, seen_directions: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W, the original's inputs x [tokens, n] and those of the compressed model x'."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    x = torch.randn(COUNT, WIDTH, dtype=torch.float64, generator=generator)
    change = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    x = x * torch.logspace(0, -1, WIDTH, dtype=torch.float64)
    noise = torch.randn(COUNT, WIDTH, dtype=torch.float64, generator=generator)
    seen = x @ (torch.eye(WIDTH, dtype=torch.float64) + 0.1 * change) + 0.05 * noise
    seen[:, seen_directions:] = 0
    return weight, x, seen


def moments(x: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S' and D."""
    return seen.T @ seen / len(x), (x - seen).T @ seen / len(x)


def test_a_mix_of_zero_keeps_the_weights() -> None:
    weight, x, seen = drifted()
    assert torch.equal(_propagated_target(weight, *moments(x, seen), mix=0), weight)


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_inputs_that_have_not_drifted_keep_the_weights(mix: float) -> None:
    weight, x, _ = drifted()
    assert torch.equal(_propagated_target(weight, *moments(x, x), mix=mix), weight)


@pytest.mark.parametrize("mix", [0.25, 0.5, 1.0])
def test_without_a_ridge_it_is_the_least_squares_fit_to_the_wanted_output(mix: float) -> None:
    weight, x, seen = drifted()
    target = _propagated_target(weight, *moments(x, seen), mix=mix, relative_ridge=0.0)
    wanted = (1 - mix) * seen @ weight.T + mix * x @ weight.T
    expected, *_ = np.linalg.lstsq(seen.numpy(), wanted.numpy(), rcond=None)
    torch.testing.assert_close(target, torch.from_numpy(expected).T, rtol=0, atol=1e-10)


def test_the_ridge_costs_little_and_undoes_most_of_the_error() -> None:
    weight, x, seen = drifted()
    exact, ridged = (
        _propagated_target(weight, *moments(x, seen), mix=1.0, relative_ridge=ridge)
        for ridge in (0.0, 1e-3)
    )
    wanted = x @ weight.T
    least, found, before = (
        (seen @ w.T - wanted).square().sum().item() for w in (exact, ridged, weight)
    )
    assert least <= found < 1.01 * least
    assert found < 0.5 * before


def test_directions_in_which_nothing_is_seen_any_more_keep_their_weights() -> None:
    weight, x, seen = drifted(seen_directions=7)
    target = _propagated_target(weight, *moments(x, seen), mix=1.0)
    assert torch.isfinite(target).all()
    torch.testing.assert_close(target[:, 7:], weight[:, 7:], rtol=0, atol=1e-12)
    assert (target[:, :7] - weight[:, :7]).abs().max() > 1e-3


def test_the_moments_are_left_as_they_were() -> None:
    weight, x, seen = drifted()
    given = moments(x, seen)
    before = [moment.clone() for moment in given]
    _propagated_target(weight, *given, mix=0.5)
    assert all(map(torch.equal, given, before))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_moments_that_are_not_finite_are_refused(place: int, mix: float) -> None:
    weight, x, seen = drifted()
    given = moments(x, seen)
    given[place][0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        _propagated_target(weight, *given, mix=mix)


@pytest.mark.parametrize(("rows", "columns"), [(9, 12), (12, 9), (10, 10)])
def test_reconstruction_at_full_rank_reproduces_the_target(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, target = torch.randn(2, rows, columns, dtype=torch.float64, generator=generator)
    inputs = torch.randn(60, columns, dtype=torch.float64, generator=generator)
    moment = inputs.T @ inputs / len(inputs)
    left, right = Spectrum.of(weight, moment).factors(min(rows, columns))
    if rows < columns:
        # The rows of V, those of W, do not span a target of other rows; those of the target do.
        left, right = Spectrum.of(target, moment).factors(rows)
    u, v = _reconstructed_factors(left, right, target, moment)
    torch.testing.assert_close(u @ v, target, rtol=0, atol=1e-9)


def test_reconstruction_fits_outputs_with_one_factor_held_and_then_weights_with_the_other() -> None:
    weight, x, seen = drifted()
    moment, drift = moments(x, seen)
    target = _propagated_target(weight, moment, drift, 0.25)
    left, right = Spectrum.of(weight, moment).factors(4)
    u, v = _reconstructed_factors(left, right, target, moment)
    expected_u, *_ = np.linalg.lstsq((seen @ right.T).numpy(), (seen @ target.T).numpy(), None)
    torch.testing.assert_close(u, torch.from_numpy(expected_u).T, rtol=0, atol=1e-9)
    expected_v = np.linalg.pinv(u.numpy()) @ target.numpy()
    torch.testing.assert_close(v, torch.from_numpy(expected_v), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_fitted_to_what_they_will_see_stay_closer_to_the_original(family: str) -> None:
    tiny = surveyed(family)
    plan = searched_plan(tiny.layers, tiny.survey.curves, 0.6)
    lost = []
    for mix in (None, 0.5):
        model = copy.deepcopy(tiny.model)
        fit = Fit(mix=mix)
        ready = calibrated(model, tiny.layers, tiny.survey)
        compress_(ready, plan, dtype=torch.float32, fit=fit)
        lost.append(divergence(tiny.model, model))
    assert lost[1] < 0.95 * lost[0]
