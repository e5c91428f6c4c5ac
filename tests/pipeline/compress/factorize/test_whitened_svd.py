"""Claims of whitened truncation, against an SVD of L W R and against averages over samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compress.factorize.second_moments import cholesky, shrunk
from pipeline.compress.factorize.whitened_svd import (
    Spectrum,
    _tails_of,
    _whitened_energies,
    _whitening_roots,
)

SHAPES = [(24, 16), (16, 24), (16, 16), (48, 8)]


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the inputs [tokens, n] it sees, with a spectrum over four decades."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    scales = torch.logspace(0, -2, columns, dtype=torch.float64)
    mixing = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    inputs = torch.randn(5 * columns, columns, dtype=torch.float64, generator=generator)
    return weight, inputs * scales @ mixing


def second_moment(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_full_rank_factorisation_is_exact(rows: int, columns: int) -> None:
    weight, inputs = problem(rows, columns)
    b, a = Spectrum.of(weight, second_moment(inputs)).factors(min(rows, columns))
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_error_equals_the_tail(rows: int, columns: int, rank: int) -> None:
    weight, inputs = problem(rows, columns)
    spectrum = Spectrum.of(weight, second_moment(inputs))
    b, a = spectrum.factors(rank)
    lost = (inputs @ (weight - b @ a).T).square().sum() / (inputs @ weight.T).square().sum()
    assert lost.item() == pytest.approx(spectrum.relative_tail(rank), rel=1e-6)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_energies_are_the_squared_singular_values_of_the_whitened_weight(
    rows: int, columns: int
) -> None:
    weight, inputs = problem(rows, columns)
    moment = second_moment(inputs)
    cholesky = torch.linalg.cholesky(moment)
    expected = torch.linalg.svdvals(weight @ cholesky).square()
    energies = Spectrum.of(weight, moment).energies
    torch.testing.assert_close(energies, expected, rtol=1e-6, atol=1e-9 * expected[0].item())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_other_product_of_that_rank_does_better(rows: int, columns: int) -> None:
    weight, inputs = problem(rows, columns)
    rank = 4
    b, a = Spectrum.of(weight, second_moment(inputs)).factors(rank)
    best = (inputs @ (weight - b @ a).T).square().sum()
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-3):
        other_b, other_a = (
            x + size * x.abs().mean() * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            for x in (b, a)
        )
        other = (inputs @ (weight - other_b @ other_a).T).square().sum()
        assert other > best
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    plain = u[:, :rank] * s[:rank] @ vt[:rank]
    assert (inputs @ (weight - plain).T).square().sum() >= best * (1 - 1e-9)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_singular_moment_is_no_failure(rows: int, columns: int) -> None:
    weight, inputs = problem(rows, columns)
    inputs = inputs[: columns // 2]
    spectrum = Spectrum.of(weight, second_moment(inputs))
    b, a = spectrum.factors(min(rows, columns))
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-8)
    # Half of the directions are never seen, so half of the rank loses nothing that is seen.
    assert spectrum.relative_tail(columns // 2) < 1e-7


def test_a_moment_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows does not fit"):
        Spectrum.of(torch.ones(2, 4), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_nan_in_the_moment_is_refused(shape: tuple[int, int]) -> None:
    moment = torch.eye(shape[1], dtype=torch.float64)
    moment[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Spectrum.of(torch.ones(shape), moment)


# Two-sided: heights of the matrices of a stack, and the width of their input; m <= n and m > n.
STACKS = [((16,), 24), ((24,), 16), ((5, 7, 4), 24), ((12, 9, 20), 16), ((10, 6), 16)]


def stacked_problem(
    heights: tuple[int, ...], columns: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """W of a stack, S, and for each of its matrices a G that is as uneven as a shrunk one can be.

    The ridge of the Cholesky roots, 1e-9 of a trace, is then at most 1e-8 m of any eigenvalue.
    """
    weight, inputs = problem(sum(heights), columns, seed)
    blocks = [
        shrunk(second_moment(problem(1, m, seed + 1 + place)[1]), 0.1)
        for place, m in enumerate(heights)
    ]
    return weight, second_moment(inputs), blocks


def two_sided_loss(
    error: torch.Tensor, moment: torch.Tensor, blocks: list[torch.Tensor]
) -> torch.Tensor:
    """tr(G D S D^T), written out."""
    return torch.trace(torch.block_diag(*blocks) @ error @ moment @ error.T)


def lost(
    spectrum: Spectrum,
    rank: int,
    weight: torch.Tensor,
    moment: torch.Tensor,
    blocks: list[torch.Tensor],
) -> float:
    b, a = spectrum.factors(rank)
    return two_sided_loss(weight - b @ a, moment, blocks).item()


@pytest.mark.parametrize(("heights", "columns"), STACKS)
def test_two_sided_full_rank_is_exact(heights: tuple[int, ...], columns: int) -> None:
    weight, moment, blocks = stacked_problem(heights, columns)
    b, a = Spectrum.of(weight, moment, blocks).factors(min(weight.shape))
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("heights", "columns"), STACKS)
@pytest.mark.parametrize("rank", [0, 1, 5, 12])
def test_two_sided_loss_equals_the_tail(heights: tuple[int, ...], columns: int, rank: int) -> None:
    weight, moment, blocks = stacked_problem(heights, columns)
    spectrum = Spectrum.of(weight, moment, blocks)
    expected = _tails_of(spectrum.energies)[rank].item()
    assert lost(spectrum, rank, weight, moment, blocks) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("heights", "columns"), STACKS)
def test_two_sided_energies_are_the_squared_singular_values_that_numpy_finds(
    heights: tuple[int, ...], columns: int
) -> None:
    weight, moment, blocks = stacked_problem(heights, columns)
    left = np.linalg.cholesky(torch.block_diag(*blocks).numpy())
    right = np.linalg.cholesky(moment.numpy())
    u, s, vt = np.linalg.svd(left.T @ weight.numpy() @ right, full_matrices=False)
    spectrum = Spectrum.of(weight, moment, blocks)
    # The ridge; and rounding, which takes 1e-16 of the largest.
    torch.testing.assert_close(
        spectrum.energies, torch.from_numpy(s**2), rtol=1e-6, atol=1e-12 * s[0] ** 2
    )
    rank = 4
    inner = u[:, :rank] * s[:rank] @ vt[:rank]
    best = np.linalg.solve(left.T, inner) @ np.linalg.inv(right)
    b, a = spectrum.factors(rank)
    scale = np.abs(best).max()
    torch.testing.assert_close(b @ a, torch.from_numpy(best), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("heights", "columns"), STACKS)
def test_no_other_product_of_that_rank_has_a_lower_two_sided_loss(
    heights: tuple[int, ...], columns: int
) -> None:
    weight, moment, blocks = stacked_problem(heights, columns)
    rank = 4
    spectrum = Spectrum.of(weight, moment, blocks)
    best = lost(spectrum, rank, weight, moment, blocks)
    # The truncation that only minds the inputs is not merely no better.
    assert lost(Spectrum.of(weight, moment), rank, weight, moment, blocks) > 1.05 * best
    b, a = spectrum.factors(rank)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-1, 1e-3, 1e-5):
        other_b, other_a = (
            x + size * x.abs().mean() * torch.randn(x.shape, dtype=x.dtype, generator=generator)
            for x in (b, a)
        )
        assert two_sided_loss(weight - other_b @ other_a, moment, blocks) > best


@pytest.mark.parametrize(("heights", "columns"), STACKS)
def test_sensitivities_of_equal_worth_change_nothing(
    heights: tuple[int, ...], columns: int
) -> None:
    weight, moment, _ = stacked_problem(heights, columns)
    ones = [torch.eye(m, dtype=torch.float64) for m in heights]
    equal, plain = Spectrum.of(weight, moment, ones), Spectrum.of(weight, moment)
    torch.testing.assert_close(equal.energies, plain.energies, rtol=1e-7, atol=1e-9)
    (b, a), (plain_b, plain_a) = equal.factors(3), plain.factors(3)
    torch.testing.assert_close(b @ a, plain_b @ plain_a, rtol=0, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    heights=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    columns=st.integers(1, 16),
    seen=st.floats(0.2, 1),
    two_sided=st.booleans(),
    seed=st.integers(0, 100),
)
def test_energies_alone_are_those_of_the_spectrum_even_if_the_moment_is_singular(
    heights: list[int], columns: int, seen: float, two_sided: bool, seed: int
) -> None:
    weight, inputs = problem(sum(heights), columns, seed)
    moment = second_moment(inputs[: max(1, round(seen * columns))])
    blocks = [shrunk(second_moment(problem(1, m, seed)[1]), 0.1) for m in heights]
    blocks = blocks if two_sided else []
    energies = _whitened_energies(weight, moment, blocks)
    expected = Spectrum.of(weight, moment, blocks).energies
    # Of directions that are never seen one holds the floor 1e-9, the other the ridge 1e-9 and,
    # where rounding made the moment indefinite, ten or a hundred of them.
    torch.testing.assert_close(energies, expected, rtol=1e-5, atol=1e-6 * float(expected[0]))
    assert energies.shape == (min(sum(heights), columns),)
    assert all(a >= b >= 0 for a, b in pairwise(energies.tolist()))


def test_tails_are_the_sums_of_what_is_left() -> None:
    energies = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    assert _tails_of(energies).tolist() == [9.0, 4.0, 1.0, 0.0]


@pytest.mark.parametrize("decompose", [Spectrum.of, _whitened_energies])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_what_does_not_fit_or_is_not_finite_is_refused(
    decompose: Any, shape: tuple[int, int]
) -> None:
    weight = torch.ones(shape)
    rows, columns = (torch.eye(size, dtype=torch.float64) for size in shape)
    with pytest.raises(ValueError, match="does not fit"):
        decompose(weight, rows)
    with pytest.raises(ValueError, match=r"sensitivities of \[2, 1\] rows do not fit"):
        decompose(weight, columns, [rows[:2, :2], rows[:1, :1]])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="moment holds NaN"):
            decompose(weight, columns * bad)
        with pytest.raises(ValueError, match="sensitivity holds NaN"):
            decompose(weight, columns, [rows * bad])


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_a_shrunk_sensitivity_of_rank_one_still_gives_the_weight_back_at_full_rank(
    shape: tuple[int, int],
) -> None:
    single = torch.zeros(shape[0], shape[0], dtype=torch.float64)
    single[0, 0] = 1
    moment = torch.eye(shape[1], dtype=torch.float64)
    weight = problem(*shape)[0]
    b, a = Spectrum.of(weight, moment, [shrunk(single, 0.1)]).factors(min(shape))
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 12), (20, 9)])
def test_refitting_the_left_factor_on_the_latent_changes_nothing(shape: tuple[int, int]) -> None:
    """B is the least-squares fit of W x on A x already: a refit after Skip has nothing to win."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    x = torch.randn(3 * columns, columns, dtype=torch.float64, generator=generator)
    moment = x.T @ x / len(x)
    b, a = Spectrum.of(weight, moment).factors(4)
    refit = torch.linalg.lstsq(x @ a.T, x @ weight.T).solution.T
    torch.testing.assert_close(refit, b)


WIDTH = 12


def moment_of(tokens: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """E[x x^T] of random tokens; singular if they are fewer than the width."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    return rows.T @ rows / tokens


def test_roots_multiply_to_the_moment_and_invert_each_other() -> None:
    moment = moment_of(60)
    root, inverse = _whitening_roots(moment)
    torch.testing.assert_close(root @ root, moment, rtol=1e-8, atol=1e-8)
    identity = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(root @ inverse, identity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, WIDTH - 1])
def test_roots_of_a_singular_moment_still_invert_each_other(tokens: int) -> None:
    moment = moment_of(tokens)
    root, inverse = _whitening_roots(moment)
    identity = torch.eye(WIDTH, dtype=torch.float64)
    # The condition of the root is 1e4.5, of which rounding takes its share.
    torch.testing.assert_close(root @ inverse, identity, rtol=0, atol=1e-9)
    largest = torch.linalg.eigvalsh(moment)[-1].item()
    torch.testing.assert_close(root @ root, moment, rtol=0, atol=1.1e-9 * largest)


@given(share=st.floats(0, 1), tokens=st.integers(1, 30), seed=st.integers(0, 100))
def test_shrinking_keeps_the_trace_and_lifts_the_smallest_eigenvalue(
    share: float, tokens: int, seed: int
) -> None:
    moment = moment_of(tokens, seed=seed)
    result = shrunk(moment, share)
    mean = moment.trace().item() / WIDTH
    assert result.trace().item() == pytest.approx(moment.trace().item(), rel=1e-12)
    assert torch.linalg.eigvalsh(result)[0].item() >= share * mean - 1e-12 * mean * WIDTH


def test_nothing_is_shrunk_by_a_share_of_zero_and_all_by_one() -> None:
    moment = moment_of(30)
    before = moment.clone()
    assert torch.equal(shrunk(moment, 0.0), before)
    identity = torch.eye(WIDTH, dtype=torch.float64) * moment.diagonal().mean()
    torch.testing.assert_close(shrunk(moment, 1.0), identity, rtol=1e-12, atol=0)
    assert torch.equal(moment, before)
    assert shrunk(moment.bfloat16(), 0.1).dtype == torch.float64


@pytest.mark.parametrize("tokens", [1, 3, WIDTH - 1, 3 * WIDTH])
def test_a_cholesky_root_gives_the_moment_back_even_if_it_is_singular(tokens: int) -> None:
    moment = moment_of(tokens)
    root = cholesky(moment)
    assert torch.equal(root, root.tril())
    # The ridge is 1e-9 of the trace.
    torch.testing.assert_close(root @ root.T, moment, rtol=0, atol=2e-9 * moment.trace().item())


def test_a_cholesky_root_exists_although_rounding_made_the_moment_indefinite() -> None:
    moment = moment_of(3) - 1e-7 * torch.eye(WIDTH, dtype=torch.float64)
    assert torch.linalg.eigvalsh(moment)[0] < 0
    root = cholesky(moment)
    torch.testing.assert_close(root @ root.T, moment, rtol=0, atol=1e-6 * moment.trace().item())


@pytest.mark.parametrize("root_of", [_whitening_roots, cholesky])
def test_a_zero_moment_is_refused_by_name(root_of: object) -> None:
    assert callable(root_of)
    with pytest.raises(ValueError, match="never reaches"):
        root_of(torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("root_of", [_whitening_roots, cholesky])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_moment_that_is_not_finite_is_refused(root_of: object, bad: float) -> None:
    assert callable(root_of)
    moment = torch.eye(3, dtype=torch.float64)
    moment[2, 1] = moment[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        root_of(moment)
