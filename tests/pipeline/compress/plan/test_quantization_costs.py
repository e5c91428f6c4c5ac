"""What rounding is expected to cost, against what it then costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.compress.factorize.factors import Factors, Form, _gptq_factors
from pipeline.compress.factorize.second_moments import weighted_gram
from pipeline.compress.factorize.whitened_svd import Spectrum
from pipeline.compress.plan.quantization_costs import _SHARES, StackCost
from pipeline.quantize.formats import Format
from pipeline.quantize.gptq import gptq
from tests.pipeline.compress.factorize.test_quantized_factors import COLUMNS, PARTS, TARGET, S, lost

STYLES = [Format.parse(name) for name in ("int3-b16-asym", "int4-b16-asym", "int8-b16-sym")]
# Expected over measured: what feedback moves beyond a clipped range costs more than expected, and
# factors of so few rows and columns scatter.
LEAST, MOST = 0.5, 1.5


@pytest.fixture(scope="module", params=["skip", "low_rank"])
def measured(request: pytest.FixtureRequest) -> tuple[Form, StackCost]:
    return request.param, StackCost.measure(TARGET, S, PARTS, STYLES, request.param)


def at_rank(form: Form, rank: int) -> Factors:
    b, a = Spectrum.of(TARGET, S, PARTS).factors(rank)
    return Factors.stored_(b, a, TARGET, S, form)


def half_cost(error: torch.Tensor, moment: torch.Tensor, sensitivity: torch.Tensor) -> float:
    return float(torch.trace(sensitivity @ error @ moment @ error.T)) / 2


def test_interpolation_meets_what_was_measured(measured: tuple[Form, StackCost]) -> None:
    _, noise = measured
    down, up = noise.at(noise.ranks)
    np.testing.assert_allclose(down, noise.down, rtol=1e-9)
    np.testing.assert_allclose(up, noise.up, rtol=1e-9)
    assert len(noise.ranks) == len(_SHARES)


def test_between_measured_ranks_costs_lie_between_and_beyond_them_the_nearest_stands(
    measured: tuple[Form, StackCost],
) -> None:
    _, noise = measured
    low, high = int(noise.ranks[1]), int(noise.ranks[2])
    for between, table in zip(
        noise.at(np.array([(low + high) // 2])), (noise.down, noise.up), strict=True
    ):
        pair = np.sort(table[1:3], axis=0)
        assert ((pair[0] <= between[0] * (1 + 1e-9)) & (between[0] <= pair[1] * (1 + 1e-9))).all()
    ends = noise.at(np.array([1, COLUMNS]))
    np.testing.assert_allclose(ends[0], noise.down[[0, -1]], rtol=1e-9)
    np.testing.assert_allclose(ends[1], noise.up[[0, -1]], rtol=1e-9)


@pytest.mark.parametrize("place", range(len(STYLES)))
def test_the_expected_cost_of_dense_matrices_is_near_what_rounding_leaves(
    measured: tuple[Form, StackCost], place: int
) -> None:
    codes = gptq(TARGET, STYLES[place], S, PARTS)
    left = half_cost(codes.values() - TARGET, S, torch.block_diag(*PARTS))
    assert LEAST * left < measured[1].dense[place] < MOST * left


@pytest.mark.parametrize("place", range(len(STYLES)))
@pytest.mark.parametrize("number", range(len(_SHARES)))
def test_the_expected_cost_of_each_factor_is_near_what_rounding_it_leaves(
    measured: tuple[Form, StackCost], place: int, number: int
) -> None:
    form, noise = measured
    factors = at_rank(form, int(noise.ranks[number]))
    style = STYLES[place]
    worth, moment = weighted_gram(factors.up, PARTS), factors.moment_of_down(S)
    down = gptq(factors.down, style, moment, [worth]).values() - factors.down
    left = half_cost(down, moment, worth)
    assert LEAST * left < noise.down[number, place] < MOST * left
    latent = factors.latent_map()
    moment = latent @ S @ latent.T
    up = gptq(factors.up, style, moment, PARTS).values() - factors.up
    left = half_cost(up, moment, torch.block_diag(*PARTS))
    assert LEAST * left < noise.up[number, place] < MOST * left


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("number", [1, 2])
def test_the_costs_of_both_factors_add_up_to_no_less_than_rounding_both_adds(
    measured: tuple[Form, StackCost], place: int, number: int
) -> None:
    """Refitting the second factor makes up for part of the first one's errors."""
    form, noise = measured
    factors = at_rank(form, int(noise.ranks[number]))
    rounded = _gptq_factors(factors, TARGET, S, PARTS, (STYLES[place], STYLES[place]))
    added = (lost(rounded.factors) - lost(factors)) / 2
    expected = noise.down[number, place] + noise.up[number, place]
    assert 0.7 * added < expected < 3 * added


def test_more_bits_are_expected_to_cost_less_everywhere(measured: tuple[Form, StackCost]) -> None:
    for table in (measured[1].dense[None], measured[1].down, measured[1].up):
        assert (np.diff(table, axis=1) < 0).all()


def test_a_matrix_of_rank_one_is_measured_at_that_rank() -> None:
    weight = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(1)).double()
    noise = StackCost.measure(weight, S, [torch.eye(2, dtype=torch.float64)], STYLES, "skip")
    assert noise.ranks.tolist() == [1]
    assert noise.up.shape == noise.down.shape == (1, len(STYLES))


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        StackCost.measure(TARGET, S * float("nan"), PARTS, STYLES, "skip")
