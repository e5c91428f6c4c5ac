"""Channel scales: what they even out, and what they leave alone."""

from __future__ import annotations

import pytest
import torch

from pipeline.quantize.balance import channel_scales

SIZES = torch.tensor([8.0, 1.0, 0.5, 2.0], dtype=torch.float64)
MOMENT = torch.diag(SIZES.square())


def test_power_one_makes_all_inputs_equally_large() -> None:
    scaled = SIZES / channel_scales(MOMENT, 1.0)
    torch.testing.assert_close(scaled, scaled.mean().expand(4))


def test_half_of_the_power_halves_the_spread_on_a_logarithmic_scale() -> None:
    scaled = (SIZES / channel_scales(MOMENT, 0.5)).log()
    assert float(scaled.std()) == pytest.approx(float(SIZES.log().std()) / 2)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_scales_have_geometric_mean_one(power: float) -> None:
    assert float(channel_scales(MOMENT, power).log().mean()) == pytest.approx(0, abs=1e-12)


def test_nothing_is_scaled_by_power_zero_or_for_an_input_that_is_always_zero() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(channel_scales(MOMENT, 0.0), ones)
    torch.testing.assert_close(channel_scales(0 * MOMENT, 0.5), ones)


@pytest.mark.parametrize(("moment", "power"), [(MOMENT, 1.5), (MOMENT * float("nan"), 0.5)])
def test_powers_out_of_range_and_broken_moments_are_refused(
    moment: torch.Tensor, power: float
) -> None:
    with pytest.raises(ValueError, match=r"outside|NaN"):
        channel_scales(moment, power)
