"""Claims of whitened truncation, against an SVD of W R and against averages over samples."""

from __future__ import annotations

import pytest
import torch

from pipeline.compress.truncate import whitened_spectrum
from pipeline.compress.whiten import whitening_roots

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
    b, a = whitened_spectrum(weight, second_moment(inputs)).factors(min(rows, columns))
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_error_equals_the_tail(rows: int, columns: int, rank: int) -> None:
    weight, inputs = problem(rows, columns)
    spectrum = whitened_spectrum(weight, second_moment(inputs))
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
    energies = whitened_spectrum(weight, moment).energies
    torch.testing.assert_close(energies, expected, rtol=1e-6, atol=1e-9 * expected[0].item())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_other_product_of_that_rank_does_better(rows: int, columns: int) -> None:
    weight, inputs = problem(rows, columns)
    rank = 4
    b, a = whitened_spectrum(weight, second_moment(inputs)).factors(rank)
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
    spectrum = whitened_spectrum(weight, second_moment(inputs))
    b, a = spectrum.factors(min(rows, columns))
    torch.testing.assert_close(b @ a, weight, rtol=0, atol=1e-8)
    # Half of the directions are never seen, so half of the rank loses nothing that is seen.
    assert spectrum.relative_tail(columns // 2) < 1e-7


def test_a_moment_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 3\) does not fit"):
        whitened_spectrum(torch.ones(2, 4), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_nan_in_the_moment_is_refused(shape: tuple[int, int]) -> None:
    moment = torch.eye(shape[1], dtype=torch.float64)
    moment[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        whitened_spectrum(torch.ones(shape), moment)


def test_roots_multiply_to_the_moment_and_invert_each_other() -> None:
    _, inputs = problem(4, 12)
    moment = second_moment(inputs)
    root, inverse = whitening_roots(moment)
    torch.testing.assert_close(root @ root, moment, rtol=1e-8, atol=1e-8)
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(root @ inverse, identity, rtol=0, atol=1e-9)


def test_a_zero_moment_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="never reaches"):
        whitening_roots(torch.zeros(3, 3, dtype=torch.float64))
