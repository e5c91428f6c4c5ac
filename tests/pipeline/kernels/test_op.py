"""The operator is the NumPy specification, with true gradients, and survives torch's own checks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.kernels.op import _counters_for, block_skip_linear
from trt_plugins.block_skip.reference import block_skip_linear as reference

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def inputs(
    indexed: bool = True, dtype: torch.dtype = torch.float64, gradients: bool = False
) -> Inputs:
    torch.manual_seed(3)
    x, a, b = torch.randn(2, 3, 12), torch.randn(7, 5), torch.randn(5, 9)
    tensors = [tensor.to(dtype).requires_grad_(gradients) for tensor in (x, a, b)]
    index = torch.randperm(12).to(torch.int32) if indexed else None
    return (tensors[0], tensors[1], tensors[2], index)


@pytest.mark.parametrize("indexed", [False, True])
def test_it_equals_the_specification(indexed: bool) -> None:
    x, a, b, index = inputs(indexed)
    expected = reference(x.numpy(), a.numpy(), b.numpy(), None if index is None else index.numpy())
    np.testing.assert_allclose(block_skip_linear(x, a, b, index).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("indexed", [False, True])
def test_torch_finds_no_fault_with_schema_shapes_and_registration(indexed: bool) -> None:
    torch.library.opcheck(block_skip_linear, inputs(indexed, torch.float32, gradients=True))


@pytest.mark.parametrize("indexed", [False, True])
def test_gradients_are_those_of_finite_differences(indexed: bool) -> None:
    x, a, b, index = inputs(indexed, gradients=True)
    assert torch.autograd.gradcheck(lambda *moved: block_skip_linear(*moved, index), (x, a, b))


def test_frozen_factors_leave_the_gradient_of_the_input_as_it_is() -> None:
    x, a, b, index = inputs(gradients=True)
    block_skip_linear(x, a, b, index).square().sum().backward()
    expected, x.grad = x.grad, None
    block_skip_linear(x, a.detach(), b.detach(), index).square().sum().backward()
    assert expected is not None
    torch.testing.assert_close(x.grad, expected)
    block_skip_linear(x.detach(), a, b.detach(), index).sum().backward()
    assert a.grad is not None


def test_a_full_rank_layer_is_a_dense_one() -> None:
    x, b = torch.randn(4, 6), torch.randn(6, 8)
    y = block_skip_linear(x, torch.empty(0, 6), b)
    torch.testing.assert_close(y, x @ b)


def test_torch_compile_keeps_it_whole() -> None:
    compiled = torch.compile(
        lambda *tensors: block_skip_linear(*tensors) + 1, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(*inputs()), block_skip_linear(*inputs()) + 1)


def test_no_rows_give_no_rows() -> None:
    _, a, b, index = inputs()
    assert block_skip_linear(torch.empty(0, 12, dtype=torch.float64), a, b, index).shape == (0, 9)


def test_a_layer_that_was_never_run_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="never ran on its stream"):
        _counters_for(0, 12345, 64)


def test_misfits_are_refused() -> None:
    x, a, b, index = inputs()
    with pytest.raises(ValueError, match="do not fit"):
        block_skip_linear(x[..., :-1], a, b, None)
    with pytest.raises(ValueError, match="one type"):
        block_skip_linear(x.float(), a, b, index)
    with pytest.raises(ValueError, match="int32"):
        block_skip_linear(x, a, b, torch.arange(12))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 100, 5000])
def test_the_kernel_agrees_with_the_cpu(dtype: torch.dtype, rows: int) -> None:
    x, a, b = torch.randn(rows, 300), torch.randn(203, 97) / 14, torch.randn(97, 131) / 10
    index = torch.randperm(300).to(torch.int32)
    x, a, b = (tensor.to(dtype) for tensor in (x, a, b))
    expected = block_skip_linear(x.double(), a.double(), b.double(), index)
    y = block_skip_linear(x.cuda(), a.cuda(), b.cuda(), index.cuda()).cpu().double()
    bound = 1e-3 if dtype == torch.float16 else 1e-2
    assert (y - expected).norm() <= bound * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 100])
def test_torch_compile_puts_it_into_cuda_graphs(rows: int) -> None:
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block_skip_linear, mode="reduce-overhead", fullgraph=True)
    x, a, b = torch.randn(rows, 300), torch.randn(203, 97) / 14, torch.randn(97, 131) / 10
    x, a, b = (tensor.half().cuda() for tensor in (x, a, b))
    with torch.inference_mode():
        expected = block_skip_linear(x, a, b)
        for _ in range(4):  # warms up, captures, replays
            torch.testing.assert_close(compiled(x, a, b).clone(), expected)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_torch_finds_no_fault_with_the_kernel() -> None:
    x, a, b, index = (t.cuda() for t in inputs(dtype=torch.float16) if t is not None)
    torch.library.opcheck(block_skip_linear, (x, a, b, index))
