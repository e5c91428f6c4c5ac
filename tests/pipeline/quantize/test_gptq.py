"""Errors fed forward: less is lost than by rounding to the nearest, on each side and on both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.quantize.formats import Format
from pipeline.quantize.gptq import InputPivots, expected_error, gptq, output_pivots
from pipeline.quantize.groupwise import Blocks, quantize_blocks

GENERATOR = torch.Generator().manual_seed(0)
ROWS, COLUMNS = 150, 90
STYLE = Format.parse("int3-b32-asym")


def _moment(size: int, decay: float = 0.05) -> torch.Tensor:
    """A second moment with strong correlations, float64 [size, size]."""
    samples = torch.randn(4 * size, size, generator=GENERATOR, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=GENERATOR, dtype=torch.float64))[0]
    scales = torch.exp(-decay * torch.arange(size, dtype=torch.float64))
    samples = samples * scales @ basis
    return samples.T @ samples / len(samples)


WEIGHT = torch.randn(ROWS, COLUMNS, generator=GENERATOR)
S, G = _moment(COLUMNS), _moment(ROWS)


def _lost(blocks: Blocks, sensitivity: torch.Tensor | None = None) -> float:
    error = torch.from_numpy(blocks.dequantized()).double() - WEIGHT
    left = error if sensitivity is None else sensitivity @ error
    return float((left @ S * error).sum())


def _nearest() -> Blocks:
    return quantize_blocks(WEIGHT.numpy(), STYLE.bits, STYLE.block, zero=STYLE.zero)


def test_feedback_along_rows_loses_less_than_half_of_rounding_to_the_nearest() -> None:
    assert _lost(gptq(WEIGHT, STYLE, S)) < 0.5 * _lost(_nearest())


def test_feedback_down_the_rows_too_loses_less_than_along_rows_alone() -> None:
    both = gptq(WEIGHT, STYLE, S, [G])
    assert _lost(both, G) < 0.9 * _lost(gptq(WEIGHT, STYLE, S), G)


def test_one_step_of_feedback_is_the_least_squares_answer() -> None:
    """With two columns the second takes the value that is best once the first is rounded."""
    weight = torch.tensor([[0.3, 0.2]])
    moment = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    style = Format.parse("int8-b16-sym")
    values = gptq(weight, style, moment).dequantized()[0]
    error = 0.3 - values[0]
    # d/dw2 of e^T S e = 0: w2 - q2 = -(S12 / S22) e1, S22 damped by a hundredth of the mean.
    best = 0.2 + error * 1.0 / (1.0 + 0.015)
    step = quantize_blocks(weight.numpy(), 8, 16, zero="sym").scales[0, 0]
    assert abs(values[1] - best) <= step / 2 * (1 + 1e-5)


def test_without_correlations_feedback_is_rounding_to_the_nearest() -> None:
    identity = torch.eye(COLUMNS, dtype=torch.float64)
    fed = gptq(WEIGHT, STYLE, identity).dequantized()
    np.testing.assert_allclose(fed, _nearest().dequantized(), atol=1e-6)


def test_a_stack_is_rounded_as_its_matrices_are() -> None:
    parts = [G[:100, :100], G[100:, 100:]]
    stacked = gptq(WEIGHT, STYLE, S, parts).dequantized()
    alone = [
        gptq(w, STYLE, S, [g]).dequantized()
        for w, g in zip(WEIGHT.split([100, 50]), parts, strict=True)
    ]
    np.testing.assert_array_equal(stacked, np.concatenate(alone))


@pytest.mark.parametrize("name", ["int4-b32-asym", "int8-row-sym", "int2-b16-asym"])
def test_whatever_fills_the_last_block_stands_for_zero(name: str) -> None:
    style = Format.parse(name)
    blocks = gptq(WEIGHT, style, S)
    middle = 2 ** (style.bits - 1) if blocks.zero_points is None else blocks.zero_points[..., None]
    values = (blocks.codes.astype(float) - middle).reshape(ROWS, -1)
    assert not values[:, COLUMNS:].any()


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        gptq(WEIGHT, STYLE, S * float("nan"))


@pytest.mark.parametrize("name", ["int8-b32-sym", "int6-b32-sym", "int4-b32-asym", "int3-b32-asym"])
def test_expected_noise_is_what_rounding_leaves(name: str) -> None:
    style = Format.parse(name)
    expected = expected_error(WEIGHT, style, InputPivots.of(S), output_pivots([G]))
    left = _lost(gptq(WEIGHT, style, S, [G]), G) / 2
    # Below 6 bits ranges are clipped, and what feedback moves beyond them costs more than expected.
    assert 0.55 * left < expected < 1.2 * left


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_matrices_of_one_row_or_column_are_rounded_too(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=GENERATOR)
    style = Format.parse("int8-b32-sym")
    inputs, outputs = (torch.eye(size, dtype=torch.float64) for size in (columns, rows))
    for sensitivities in ([], [outputs]):
        codes = gptq(weight, style, inputs, sensitivities)
        values = torch.from_numpy(codes.dequantized())
        assert (values - weight).abs().max() <= codes.scales.max() / 2 * (1 + 1e-5)
    assert expected_error(weight, style, InputPivots.of(inputs), output_pivots([outputs])) > 0
