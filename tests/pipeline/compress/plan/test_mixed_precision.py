"""The choice of 8 bits or numbers for each convolution, against every choice there is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pipeline.compress.plan.mixed_precision import ConvChoice, rounded_convs
from pipeline.errors import InputError


def test_it_is_the_best_of_all_choices_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    choices = {
        f"conv{i}": ConvChoice.of_bytes(int(rng.integers(50, 900)), 8, float(rng.exponential()))
        for i in range(8)
    }
    whole = sum(choice.kept for choice in choices.values())
    for part in (0.35, 0.6, 0.9):
        budget = int(part * whole)
        best = min(
            sum(c.loss for c, rounded in zip(choices.values(), every, strict=True) if rounded)
            for every in product((False, True), repeat=len(choices))
            if sum(
                c.rounded if rounded else c.kept
                for c, rounded in zip(choices.values(), every, strict=True)
            )
            <= budget
        )
        names = rounded_convs(choices, budget)
        assert sum(choices[name].loss for name in names) == pytest.approx(best, rel=1e-4)
        kept = sum(c.rounded if name in names else c.kept for name, c in choices.items())
        assert kept <= budget


def test_what_gains_by_rounding_is_rounded_even_under_a_wide_budget() -> None:
    choices = {"a": ConvChoice.of_float_macs(100, -0.5), "b": ConvChoice.of_float_macs(100, 0.5)}
    assert rounded_convs(choices, 1000) == ["a"]
    assert rounded_convs(choices, 0) == ["a", "b"]


def test_bytes_are_those_of_codes_scales_and_biases() -> None:
    choice = ConvChoice.of_bytes(8 * 3 * 9, 8, 0.0)
    assert (choice.rounded, choice.kept) == (216 + 16 + 32, 864 + 32)
    # 27 numbers of an output in 4 bits end in half a byte.
    assert ConvChoice.of_bytes(8 * 3 * 9, 8, 0.0, 4).rounded == 8 * 14 + 16 + 32


def test_a_budget_below_all_rounded_is_refused() -> None:
    with pytest.raises(InputError, match="too small") as caught:
        rounded_convs({"a": ConvChoice(10, 40, 1.0)}, 9)
    assert "at least 10" in str(caught.value)
