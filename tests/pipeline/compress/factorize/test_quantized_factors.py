"""Factors in few bits: errors are made up for, and what is not asked for is left alone."""

from __future__ import annotations

import pytest
import torch

from pipeline.compress.factorize.factors import Factors, Form, _Formats, _gptq_factors, _rtn_factors
from pipeline.compress.factorize.whitened_svd import Spectrum
from pipeline.quantize.formats import Format

GENERATOR = torch.Generator().manual_seed(0)
ROWS, COLUMNS, RANK = 60, 48, 20


def moment_of(size: int, decay: float) -> torch.Tensor:
    """A second moment with strong correlations, float64 [size, size]."""
    samples = torch.randn(4 * size, size, generator=GENERATOR, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=GENERATOR, dtype=torch.float64))[0]
    scaled = samples * torch.exp(-decay * torch.arange(size, dtype=torch.float64)) @ basis
    return scaled.T @ scaled / len(scaled)


TARGET = torch.randn(ROWS, COLUMNS, generator=GENERATOR, dtype=torch.float64)
S = moment_of(COLUMNS, 0.05)
PARTS = [moment_of(40, 0.03), moment_of(20, 0.03)]


def factors_in(form: Form) -> Factors:
    b, a = Spectrum.of(TARGET, S, PARTS).factors(RANK)
    return Factors.stored_(b, a, TARGET, S, form)


def styles_of(down: str | None, up: str | None) -> _Formats:
    first, second = (None if name is None else Format.parse(name) for name in (down, up))
    return first, second


def product(factors: Factors) -> torch.Tensor:
    return factors.up @ factors.latent_map()


def lost(factors: Factors, sensitivities: list[torch.Tensor] = PARTS) -> float:
    """tr(G E S E^T) against the target."""
    error = TARGET - product(factors)
    sensitivity = torch.block_diag(*sensitivities)
    return float(torch.trace(sensitivity @ error @ S @ error.T))


@pytest.mark.parametrize("form", ["skip", "low_rank"])
def test_the_latent_map_gives_the_product_that_is_stored(form: Form) -> None:
    exact = Spectrum.of(TARGET, S, PARTS).factors(RANK)
    torch.testing.assert_close(product(factors_in(form)), exact[0] @ exact[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["skip", "low_rank"])
@pytest.mark.parametrize(
    ("down", "up"), [("int4-b16-asym", "int4-b16-asym"), ("int3-b16-asym", "int8-row-sym")]
)
def test_errors_fed_forward_lose_less_than_rounding_to_the_nearest(
    form: Form, down: str, up: str
) -> None:
    factors, styles = factors_in(form), styles_of(down, up)
    fed = _gptq_factors(factors, TARGET, S, PARTS, styles).factors
    nearest = _rtn_factors(factors, styles).factors
    added = [lost(rounded) - lost(factors) for rounded in (fed, nearest)]
    assert added[0] < 0.75 * added[1]


@pytest.mark.parametrize("form", ["skip", "low_rank"])
@pytest.mark.parametrize(
    "style", ["int2-b16-asym", "int3-b16-asym", "int4-b16-asym", "int8-row-sym"]
)
def test_refitting_the_second_factor_never_loses(form: Form, style: str) -> None:
    """B* is the least-squares answer on the latent that the rounded A gives."""
    factors = factors_in(form)
    refitted = _gptq_factors(factors, TARGET, S, PARTS, styles_of(style, None)).factors
    kept = Factors(form, RANK, factors.up, refitted.down, factors.permutation, 0.0)
    every = (PARTS, [torch.eye(ROWS, dtype=torch.float64)])
    for sensitivities in every:
        assert lost(refitted, sensitivities) <= lost(kept, sensitivities) * (1 + 1e-9)


@pytest.mark.parametrize("form", ["skip", "low_rank"])
def test_the_refitted_factor_solves_the_normal_equations(form: Form) -> None:
    refitted = _gptq_factors(factors_in(form), TARGET, S, PARTS, styles_of("int3-b16-asym", None))
    latent = refitted.factors.latent_map()
    gradient = (product(refitted.factors) - TARGET) @ S @ latent.T
    scale = (TARGET @ S @ latent.T).abs().max()
    assert gradient.abs().max() < 1e-4 * scale  # the ridge is 1e-6 of the mean


@pytest.mark.parametrize("form", ["skip", "low_rank"])
def test_without_formats_the_factors_are_left_alone(form: Form) -> None:
    factors = factors_in(form)
    for rounded in (
        _gptq_factors(factors, TARGET, S, PARTS, (None, None)),
        _rtn_factors(factors, (None, None)),
    ):
        assert rounded.down is rounded.up is None
        assert torch.equal(rounded.factors.down, factors.down)
        assert torch.equal(rounded.factors.up, factors.up)


@pytest.mark.parametrize("form", ["skip", "low_rank"])
def test_a_format_for_the_second_factor_leaves_the_first_alone(form: Form) -> None:
    factors = factors_in(form)
    rounded = _gptq_factors(factors, TARGET, S, PARTS, styles_of(None, "int4-b16-asym"))
    assert rounded.down is None
    assert rounded.up is not None
    assert torch.equal(rounded.factors.down, factors.down)
    assert torch.equal(rounded.factors.up, rounded.up.values())


@pytest.mark.parametrize("form", ["skip", "low_rank"])
def test_the_factors_are_the_values_of_the_codes(form: Form) -> None:
    styles = styles_of("int6-b16-sym", "int3-b16-asym")
    rounded = _gptq_factors(factors_in(form), TARGET, S, PARTS, styles)
    assert rounded.down is not None
    assert rounded.up is not None
    assert torch.equal(rounded.factors.down, rounded.down.values())
    assert torch.equal(rounded.factors.up, rounded.up.values())


def test_eight_bits_add_next_to_nothing() -> None:
    factors, styles = factors_in("skip"), styles_of("int8-row-sym", "int8-row-sym")
    rounded = _gptq_factors(factors, TARGET, S, PARTS, styles).factors
    assert lost(rounded) < 1.01 * lost(factors)


def test_at_full_rank_there_is_no_first_factor_to_round() -> None:
    b, a = Spectrum.of(TARGET, S).factors(COLUMNS)
    factors = Factors.stored_(b, a, TARGET, S, "skip")
    rounded = _gptq_factors(factors, TARGET, S, [], styles_of("int4-b16-asym", "int8-row-sym"))
    assert rounded.down is None
    assert rounded.up is not None


def test_what_the_first_factor_of_a_skip_form_multiplies_is_what_it_skips_not() -> None:
    factors = factors_in("skip")
    assert factors.permutation is not None
    x = torch.randn(2000, COLUMNS, generator=GENERATOR, dtype=torch.float64)
    others = x[:, factors.permutation[RANK:].long()]
    expected = others.T @ others
    torch.testing.assert_close(factors.moment_of_down(x.T @ x), expected)
