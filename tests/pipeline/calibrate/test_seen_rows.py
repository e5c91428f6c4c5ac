"""Sums that are made block by block over all batches, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.calibrate import precision
from pipeline.calibrate.moments import BLOCK, Drift, SecondMoment
from pipeline.calibrate.seen_rows import (
    SeenRows,
    mean_drift,
    mean_input_moment,
    mean_output_moment,
    mean_weighted_moment,
)

WIDTH = 2 * BLOCK + 7


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)


def batches(seed: int, *lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def gram(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return rows.double().T @ others.double() / len(rows)


def test_moments_are_the_means_over_all_batches() -> None:
    rows, weights = batches(0, 20, 1, 33), [torch.rand(20), torch.rand(1), torch.rand(33)]
    whole, weight = torch.cat(rows), torch.cat(weights)[:, None]
    expected = gram(whole, whole)
    torch.testing.assert_close(mean_input_moment(*rows).double(), expected, rtol=1e-5, atol=1e-5)
    found = mean_weighted_moment(*rows, *weights).double()
    torch.testing.assert_close(found, gram(whole * weight, whole), rtol=1e-5, atol=1e-5)
    found = mean_output_moment(*rows)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-2)


def test_they_are_the_bytes_of_sums_that_grow_batch_by_batch() -> None:
    rows, others = batches(1, 20, 33), batches(2, 20, 33)
    moment, drift = SecondMoment(WIDTH), Drift(WIDTH)
    for x, original in zip(rows, others, strict=True):
        moment.add_(x)
        drift.add_(original.bfloat16(), x)
    assert torch.equal(mean_input_moment(*rows), moment.mean().float())
    found = mean_drift(*(original.bfloat16() for original in others), *rows)
    assert torch.equal(found, drift.mean().float())
    x, original = torch.cat(rows), torch.cat(others).bfloat16()
    expected = gram(original - x, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [mean_input_moment, mean_output_moment])
def test_no_tokens_have_no_mean(function: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        function(torch.empty(0, 4), torch.empty(0, 4))


def test_what_a_batch_shows_is_kept_with_the_weights_of_its_gradients() -> None:
    seen = SeenRows(4, {"q": 3, "k": 2})
    x, q, k = torch.randn(2, 5, 4), torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    seen.see_input(x)
    seen.see_gradient("k", k)
    seen.see_gradient("q", q)
    inputs, weights, of_q, of_k = seen.parts()
    assert torch.equal(inputs, x.flatten(0, 1))
    squares = [g.flatten(0, 1).square().sum(1) for g in (q, k)]
    expected = torch.stack([s / s.mean() for s in squares]).mean(0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(of_q, q.flatten(0, 1))
    torch.testing.assert_close(of_k, k.flatten(0, 1))


def test_a_linear_that_no_token_reaches_shows_nothing() -> None:
    shapes = [part.shape for part in SeenRows(4, {"q": 3}).parts()]
    assert shapes == [(0, 4), (0,), (0, 3)]


def test_values_that_are_no_numbers_are_refused() -> None:
    seen = SeenRows(2, {"q": 2})
    with pytest.raises(ValueError, match="activations"):
        seen.see_input(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(ValueError, match="gradients"):
        seen.see_gradient("q", torch.tensor([[1.0, torch.nan]]))
