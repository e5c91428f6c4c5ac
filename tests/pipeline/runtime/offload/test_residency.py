"""As many layers stay as fit, in full, and those that are read lie between them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeline.runtime.offload.residency import _resident_layers


@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_as_many_stay_as_fit_and_one_more_would_not(layers: int) -> None:
    for count in range(layers + 1):
        for spare in (0, 9):
            assert len(_resident_layers([10] * layers, 10 * count + spare)) == count


def test_they_are_spread_over_the_model() -> None:
    found = sorted(_resident_layers([1] * 30, 10))
    assert {b - a for a, b in pairwise(found)} == {3}


def test_of_layers_of_several_sizes_no_more_stay_than_fit() -> None:
    sizes = [5, 50, 5, 50, 5, 50]
    for budget in range(200):
        assert sum(sizes[n] for n in _resident_layers(sizes, budget)) <= budget
    assert _resident_layers(sizes, sum(sizes)) == frozenset(range(6))
