"""Costs of a stack: those of its definition, in no more memory than is stated beforehand."""

from __future__ import annotations

import sys

import pytest
import torch

from pipeline.compress.factorize.second_moments import ROWS_AT_ONCE, Shrunk, shrunk, weighted_gram
from pipeline.compress.plan.stack_costs import (
    CostRequest,
    CostsOfStack,
    cost_bytes,
    stack_costs,
)
from pipeline.errors import InputError
from pipeline.memory import forget_peak, peak_bytes, return_free_memory
from pipeline.quantize.formats import Format

FORMATS = (Format.parse("int4-b32-asym"), Format.parse("int8-b32-sym"))


def moment_of(width: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    rows = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(seed))
    return (rows.T @ rows / len(rows)).to(dtype)


def members_of(heights: list[int], columns: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(m, columns, generator=generator), moment_of(m, m, torch.bfloat16))
        for m in heights
    ]


def costs_of(
    members: list[tuple[torch.Tensor, torch.Tensor]], geometry: torch.Tensor, wanted: CostRequest
) -> CostsOfStack:
    """Where the gradients weigh all tokens alike."""
    weights, outputs = zip(*members, strict=True)
    return stack_costs(("a",) * len(members), wanted, geometry, geometry, *weights, *outputs)


@pytest.mark.parametrize("heights", [[8], [24], [16, 16, 8]])
def test_a_curve_is_half_the_tail_of_the_squared_singular_values(heights: list[int]) -> None:
    geometry, members = moment_of(20, 1), members_of(heights, 20)
    curve, rounding = costs_of(members, geometry, CostRequest())
    roots = [torch.linalg.cholesky(shrunk(g, 0.1)).T for _, g in members]
    inner = torch.cat([root @ w.double() for root, (w, _) in zip(roots, members, strict=True)])
    values = torch.linalg.svdvals(inner @ torch.linalg.cholesky(geometry)).square()
    tails = torch.cat([values.flip(0).cumsum(0).flip(0), torch.zeros(1)]) / 2
    assert rounding is None
    torch.testing.assert_close(curve, tails, rtol=1e-6, atol=1e-9)


def test_a_shrunk_moment_gives_the_rows_of_the_whole_one() -> None:
    moment = moment_of(30, 2, torch.bfloat16)
    own = Shrunk(moment, 0.1, 0.1 * float(moment.diagonal().double().mean()))
    torch.testing.assert_close(own.double(), shrunk(moment, 0.1))
    torch.testing.assert_close(own[7:19], shrunk(moment, 0.1)[7:19])
    assert torch.equal(own.moment, moment)


def test_a_gram_matrix_by_parts_is_that_of_the_whole() -> None:
    height = ROWS_AT_ONCE + 3
    weight = torch.randn(height, 5, generator=torch.Generator().manual_seed(3))
    moment = torch.ones(height, height).tril().double()
    torch.testing.assert_close(
        weighted_gram(weight, [moment]), weight.double().T @ moment @ weight.double()
    )


@pytest.mark.parametrize("place", ["geometry", "output"])
def test_moments_that_are_no_numbers_are_refused_with_the_names_of_the_stack(place: str) -> None:
    geometry, [(weight, output)] = moment_of(6, 1), members_of([9], 6)
    bad = geometry if place == "geometry" else output
    bad[2, 3] = torch.nan
    with pytest.raises(InputError, match="q_proj"):
        stack_costs(("q_proj",), CostRequest(), geometry, geometry, weight, output)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is reset by Linux alone")
@pytest.mark.parametrize(
    ("heights", "columns", "formats"),
    [([1600], 3200, ()), ([3200, 3200], 1600, ()), ([768], 3072, FORMATS), ([2560], 1024, FORMATS)],
)
def test_no_more_memory_is_taken_than_was_stated(
    heights: list[int], columns: int, formats: tuple[Format, ...]
) -> None:
    geometry, members = torch.eye(columns), []
    for height in heights:
        members.append((torch.randn(height, columns), torch.eye(height).bfloat16()))
    wanted = CostRequest(formats=formats)
    return_free_memory()
    forget_peak()
    before = peak_bytes()
    costs_of(members, geometry, wanted)
    assert peak_bytes() - before < 1.15 * cost_bytes(columns, heights, wanted)
