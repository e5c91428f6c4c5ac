"""A fit takes no more memory than it declares, whichever of its stages is the largest."""

from __future__ import annotations

import sys

import pytest
import torch

from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.fit_group import fit_group
from pipeline.compress.fit_memory import SMALL_BYTES, fit_bytes
from pipeline.compress.methods import Fit
from pipeline.compress.plan.plan import GroupPlan
from pipeline.compress.plan.stack_costs import OutputStatistics
from pipeline.memory import forget_peak, peak_bytes, return_free_memory

FORMAT = "int4-b32-asym"
WIDTH, HEIGHT = 8192, 28672


def planned(heights: list[int], columns: int, form: str, *formats: str | None) -> GroupPlan:
    members, rows = ("a", "b")[: len(heights)], sum(heights)
    full = min(rows, columns)
    rank = full if form == "dense" else int(0.45 * full)
    return GroupPlan(members, rows, columns, form, rank, None, None, *formats)  # type: ignore[arg-type]


def moment(size: int) -> torch.Tensor:
    drawn = torch.randn(size // 4, size, generator=torch.Generator().manual_seed(size))
    found = drawn.T @ drawn / len(drawn)
    found.diagonal().add_(0.1)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is reset by Linux alone")
@pytest.mark.parametrize(
    ("heights", "columns", "form", "formats", "drifted"),
    [
        ([2560, 2560], 1024, "skip", (None, None), True),
        ([2560, 2560], 1024, "dense", (None, FORMAT), False),
        ([768], 3072, "skip", (FORMAT, FORMAT), False),
        ([768], 3072, "skip", (None, None), True),
    ],
)
def test_no_more_memory_is_taken_than_is_declared(
    heights: list[int],
    columns: int,
    form: str,
    formats: tuple[str | None, str | None],
    drifted: bool,
) -> None:
    group = planned(heights, columns, form, *formats)
    weights = [torch.randn(height, columns) / 50 for height in heights]
    outputs = tuple(moment(height).bfloat16() for height in heights)
    statistics, drift = OutputStatistics(moment(columns), outputs), None
    if drifted:
        drift = moment(columns) / 100
    inputs = InputMoments(moment(columns), drift)
    return_free_memory()
    forget_peak()
    before = peak_bytes()
    fit_group(group, weights, inputs, statistics, Fit(mix=0.5), torch.float16)
    assert peak_bytes() - before < 1.1 * fit_bytes(group, heights, drifted=drifted)


@pytest.mark.parametrize("formats", [(None, None), (FORMAT, FORMAT)])
@pytest.mark.parametrize("heights", [[HEIGHT, HEIGHT], [WIDTH]])
def test_the_widest_layers_fit_a_machine_of_64_gb(
    heights: list[int], formats: tuple[str | None, str | None]
) -> None:
    columns = WIDTH if len(heights) > 1 else HEIGHT
    found = fit_bytes(planned(heights, columns, "skip", *formats), heights, itemsize=2)
    assert found < 25e9


def test_twice_the_width_takes_four_times_the_memory_and_no_more() -> None:
    sizes = [
        fit_bytes(planned([5 * k, 5 * k], 4 * k, "skip", FORMAT, FORMAT), [5 * k, 5 * k])
        - SMALL_BYTES
        for k in (1024, 2048)
    ]
    assert 3.5 * sizes[0] < sizes[1] <= 4 * sizes[0]
