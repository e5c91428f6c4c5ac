"""Factored layers compute what their factors say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.checkpoint.install import group_entries, group_tensors, install_
from pipeline.checkpoint.modeling_skipcat import FactoredLinear, SkipCatConfig
from pipeline.compress.factorize.factors import Factors, Form
from pipeline.compress.factorize.whitened_svd import Spectrum


class Pair(nn.Module):
    """Two linears on one input, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 12, bias=True)
        self.second = nn.Linear(16, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x)], dim=-1)


def installed(form: Form, rank: int) -> tuple[Pair, Pair]:
    """The pair as it was, and with its stack factored."""
    torch.manual_seed(0)
    dense = Pair().double()
    factored = copy.deepcopy(dense)
    stack = torch.cat([dense.first.weight, dense.second.weight]).detach()
    moment = torch.eye(16, dtype=torch.float64)
    b, a = Spectrum.of(stack, moment).factors(rank)
    factors = Factors.stored_(b, a, stack, moment, form)
    members = ("first", "second")
    stored = (factors.down, factors.up, factors.permutation)
    tensors = group_tensors(members, [12, 6], *stored, torch.float64)
    install_(factored, group_entries(members, form, rank), tensors)
    return dense, factored


@pytest.mark.parametrize("form", ["low_rank", "skip"])
def test_full_rank_factors_give_the_dense_outputs(form: Form) -> None:
    dense, factored = installed(form, 16)
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(factored(x), dense(x), rtol=0, atol=1e-10)


def test_skip_form_equals_low_rank_form_to_1e_10() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    _, low_rank = installed("low_rank", 7)
    _, skip = installed("skip", 7)
    assert (low_rank(x) - skip(x)).abs().max() <= 1e-10


@pytest.mark.parametrize("form", ["low_rank", "skip"])
def test_the_latent_is_stored_once_for_layers_that_share_it(form: Form) -> None:
    _, factored = installed(form, 7)
    names = {name for name, _ in factored.named_parameters()}
    assert names == {"first.down.weight", "first.up.weight", "first.up.bias", "second.up.weight"}
    stored = sum(p.numel() for n, p in factored.named_parameters() if not n.endswith("bias"))
    assert stored == (7 * (18 + 16 - 7) if form == "skip" else 7 * (18 + 16))


@pytest.mark.parametrize("form", ["low_rank", "skip"])
def test_dense_weight_is_the_matrix_that_the_layer_applies(form: Form) -> None:
    _, factored = installed(form, 7)
    x = torch.randn(5, 16, dtype=torch.float64)
    layer = factored.get_submodule("second")
    assert isinstance(layer, FactoredLinear)
    expected = x @ layer.dense_weight().T
    torch.testing.assert_close(layer.weight, layer.dense_weight().to(layer.up.weight.dtype))
    torch.testing.assert_close(factored.second(x), expected, rtol=0, atol=1e-12)


def test_copies_share_their_latent_among_themselves() -> None:
    _, factored = installed("skip", 7)
    copied = copy.deepcopy(factored)
    assert copied.second.owner is copied.first
    assert copied.second.owner is not factored.first


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        FactoredLinear(4, 4, 2, "diagonal")


def test_a_newer_checkpoint_format_is_refused() -> None:
    with pytest.raises(ValueError, match="newer"):
        SkipCatConfig({}, version=99)
