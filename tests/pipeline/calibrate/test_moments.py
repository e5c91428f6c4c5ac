from __future__ import annotations

import pytest
import torch

from pipeline.calibrate.moments import SecondMoment


def relative_error(moment: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(moment - exact) / torch.linalg.norm(exact))


@pytest.mark.parametrize("batches", [1, 400])
def test_the_error_does_not_grow_with_the_number_of_batches(batches: int) -> None:
    torch.manual_seed(0)
    # Not centred, so that the sum keeps growing and a float32 sum would lose digits.
    inputs = torch.randn(batches, 10, 24) + 3.0
    moment = SecondMoment(24)
    plain = torch.zeros(24, 24)
    for batch in inputs:
        moment.add_(batch)
        plain += batch.T @ batch
    rows = inputs.reshape(-1, 24).double()
    exact = rows.T @ rows
    # A float32 product of ten terms: a few units of 2^-24, less after averaging.
    assert relative_error(moment.total, exact) < 2e-7
    assert moment.total.dtype == torch.float64
    if batches > 1:
        assert relative_error(moment.total, exact) < relative_error(plain.double(), exact)


def test_leading_dimensions_are_tokens() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 5, 8)
    moment = SecondMoment(8)
    moment.add_(inputs)
    rows = inputs.reshape(30, 8).double()
    assert moment.tokens == 30
    assert torch.allclose(moment.mean(), rows.T @ rows / 30, atol=1e-6)


def test_half_precision_inputs_are_not_multiplied_in_half_precision() -> None:
    inputs = torch.full((100, 4), 300.0, dtype=torch.float16)
    moment = SecondMoment(4)
    moment.add_(inputs)
    assert torch.equal(moment.mean(), torch.full((4, 4), 9e4, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_and_not_added(bad: float) -> None:
    moment = SecondMoment(4)
    moment.add_(torch.ones(3, 4))
    inputs = torch.ones(3, 4)
    inputs[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        moment.add_(inputs)
    assert moment.tokens == 3
    assert torch.equal(moment.total, torch.full((4, 4), 3.0, dtype=torch.float64))


def test_opposite_infinities_do_not_cancel() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        SecondMoment(2).add_(torch.tensor([[float("inf"), -float("inf")]]))


def test_a_mean_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        SecondMoment(4).mean()
