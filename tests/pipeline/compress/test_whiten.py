"""Roots of second moments, well and badly estimated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compress.whiten import cholesky, shrunk, whitening_roots

WIDTH = 12


def moment_of(tokens: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """E[x x^T] of random tokens; singular if they are fewer than the width."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, width, dtype=torch.float64, generator=generator)
    return rows.T @ rows / tokens


def test_roots_multiply_to_the_moment_and_invert_each_other() -> None:
    moment = moment_of(60)
    root, inverse = whitening_roots(moment)
    torch.testing.assert_close(root @ root, moment, rtol=1e-8, atol=1e-8)
    identity = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(root @ inverse, identity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, WIDTH - 1])
def test_roots_of_a_singular_moment_still_invert_each_other(tokens: int) -> None:
    moment = moment_of(tokens)
    root, inverse = whitening_roots(moment)
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


@pytest.mark.parametrize("root_of", [whitening_roots, cholesky])
def test_a_zero_moment_is_refused_by_name(root_of: object) -> None:
    assert callable(root_of)
    with pytest.raises(ValueError, match="never reaches"):
        root_of(torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("root_of", [whitening_roots, cholesky])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_moment_that_is_not_finite_is_refused(root_of: object, bad: float) -> None:
    assert callable(root_of)
    moment = torch.eye(3, dtype=torch.float64)
    moment[2, 1] = moment[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        root_of(moment)
