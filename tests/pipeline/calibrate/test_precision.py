"""Products in bfloat16: what is rounded, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.calibrate import precision
from pipeline.calibrate.precision import fast_steps, quick_float32
from tests.support.families import tiny_model

IDS = torch.arange(12)[None]


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: True)


@pytest.mark.usefixtures("units")
def test_inputs_and_weights_of_linears_are_rounded_and_biases_are_not() -> None:
    layer, x = nn.Linear(40, 24), torch.randn(3, 40)
    with torch.no_grad(), fast_steps(layer) as rounded:
        found = layer(x)
    expected = x.bfloat16().double() @ layer.weight.bfloat16().double().T
    assert rounded
    assert found.dtype == torch.float32
    # One rounding of the product to bfloat16, 2^-9 of it.
    torch.testing.assert_close(
        found.double(), expected + layer.bias.double(), rtol=2**-8, atol=2**-8
    )


@pytest.mark.usefixtures("units")
def test_a_model_goes_on_in_float32_behind_its_linears_and_is_itself_afterwards() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        before = model(IDS).logits
        with fast_steps(model):
            cached = model(IDS, use_cache=True)
        after = model(IDS).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, cached.logits)
    assert cached.past_key_values.layers[0].values.dtype == torch.float32
    # Of logits of about 1: some roundings of 2^-9 one after the other.
    torch.testing.assert_close(cached.logits, before, rtol=0, atol=0.05)


@pytest.mark.usefixtures("units")
def test_a_model_in_half_precision_is_left_as_it_is() -> None:
    model = tiny_model("llama").bfloat16()
    with torch.no_grad(), fast_steps(model) as rounded:
        found = model(IDS).logits
    assert not rounded
    assert torch.equal(found, model(IDS).logits)


def test_nothing_is_rounded_where_that_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)
    model = tiny_model("llama")
    with torch.no_grad(), fast_steps(model) as rounded:
        assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert not rounded


@pytest.mark.parametrize("shape", [(1, 160), (4, 1, 160), (33, 160)])
def test_matrices_that_are_laid_out_once_multiply_as_they_did(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)
    layer, x = nn.Linear(160, 96), torch.randn(shape)
    with torch.no_grad(), fast_steps(layer) as rounded:
        found = layer(x)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    assert not rounded
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("rows", [2, 7, 130])
@pytest.mark.parametrize("amd", [True, False])
def test_quick_products_of_float32_are_not_rounded(
    rows: int, amd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that may round to bfloat16 does not, without AMX."""
    monkeypatch.setattr(precision, "is_of_amd", lambda: amd)
    weight, x = torch.randn(192, 160), torch.randn(rows, 160)
    with quick_float32():
        found = nn.functional.linear(x, weight), x.T @ x
    expected = x.double() @ weight.double().T, x.double().T @ x.double()
    for own, exact in zip(found, expected, strict=True):
        # float32 has 2^-24 of each of 160 terms; bfloat16 would have 2^-9.
        assert (own.double() - exact).abs().max() < 1e-6 * exact.abs().max()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # type: ignore[attr-defined]
