"""The reference is the factored layer that torch runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from trt_plugins.block_skip.reference import block_skip_linear


def layer() -> FactoredLinear:
    torch.manual_seed(0)
    made = FactoredLinear(12, 7, 5, "skip", bias=True, dtype=torch.float64)
    made.permutation = torch.randperm(12).to(torch.int32)
    return made


def test_reference_equals_the_factored_layer() -> None:
    made = layer()
    assert made.up.bias is not None
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    y = block_skip_linear(
        x.numpy(),
        made.down.weight.detach().numpy().T,
        made.up.weight.detach().numpy().T,
        made.permutation.numpy(),
        made.up.bias.detach().numpy(),
    )
    np.testing.assert_allclose(y, made(x).detach().numpy(), rtol=0, atol=1e-12)


def test_reference_equals_the_dense_product() -> None:
    made = layer()
    x = np.random.default_rng(0).normal(size=(4, 12))
    y = block_skip_linear(
        x,
        made.down.weight.detach().numpy().T,
        made.up.weight.detach().numpy().T,
        made.permutation.numpy(),
    )
    np.testing.assert_allclose(y, x @ made.dense_weight().detach().numpy().T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [None, np.arange(5)])
def test_shapes_that_do_not_fit_are_refused(index: np.ndarray | None) -> None:
    columns = 7 if index is None else 6
    with pytest.raises(ValueError, match="fit"):
        block_skip_linear(np.ones((1, columns)), np.ones((2, 4)), np.ones((4, 3)), index)
