"""The operator of codes is the NumPy specification of what the codes stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.kernels.quantized_op import _launch, block_skip_linear_quantized, columns_of
from pipeline.quantize.formats import Format
from pipeline.quantize.kernel_codes import kernel_block, kernel_codes
from tests.support.quantised_layers import random_blocks
from trt_plugins.block_skip.reference import block_skip_linear as reference

N, RANK, M = 75, 33, 21
FORMATS = [None, "int4-b16-sym", "int4-b64-sym", "int8-b32-sym", "int8-row-sym"]


def operands(
    a: str | None, b: str | None, indexed: bool = True, dense: bool = False
) -> tuple[list[Any], np.ndarray]:
    """What the operator is given, and its result in float64."""
    random = np.random.default_rng(1)
    x = random.normal(size=(2, 3, N)).astype(np.float32)
    index = random.permutation(N).astype(np.int32) if indexed else None
    bits, blocks = [0, 0], [0, 0]
    tensors: list[Any] = []
    numbers: list[np.ndarray] = []
    for place, (name, rows, columns) in enumerate(
        ((a, RANK, N - RANK), (b, M, N if dense else RANK))
    ):
        if dense and place == 0:
            tensors += [None, None]
            numbers.append(np.zeros((0, N)))
            continue
        held = random_blocks(rows, columns, name or "int8-row-sym", place)
        numbers.append(held.dequantized().T)
        if name is None:
            tensors += [torch.from_numpy(numbers[-1].copy()), None]
            continue
        format_ = Format.parse(name)
        bits[place], blocks[place] = format_.bits, kernel_block(format_, columns)
        tensors.append(torch.from_numpy(kernel_codes(held).copy()))
        tensors.append(torch.from_numpy(held.scales.T.copy()))
    given: list[Any] = [torch.from_numpy(x), *tensors]
    given += [None if index is None else torch.from_numpy(index), bits, blocks]
    return given, reference(x, numbers[0], numbers[1], index)


@pytest.mark.parametrize("b", FORMATS[1:])
@pytest.mark.parametrize("a", FORMATS)
def test_factors_of_any_formats_equal_the_specification(a: str | None, b: str) -> None:
    given, expected = operands(a, b)
    y = block_skip_linear_quantized(*given).numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("b", FORMATS[1:])
def test_a_dense_layer_has_no_a(b: str, indexed: bool) -> None:
    given, expected = operands(None, b, indexed, dense=True)
    y = block_skip_linear_quantized(*given).numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dense", [False, True])
def test_torch_finds_no_fault_with_schema_and_shapes(dense: bool) -> None:
    given, _ = operands("int4-b16-sym", "int8-row-sym", dense=dense)
    torch.library.opcheck(block_skip_linear_quantized, tuple(given))


@pytest.mark.parametrize("name", FORMATS[1:])
def test_columns_are_picked_as_rows_of_what_they_stand_for(name: str) -> None:
    held, format_ = random_blocks(M, N, name), Format.parse(name)
    codes, scale = (torch.from_numpy(t.copy()) for t in (kernel_codes(held), held.scales.T))
    places = torch.tensor([4, 0, 20, 7, 7])
    rows = columns_of(codes, scale, format_.bits, kernel_block(format_, N), places)
    np.testing.assert_array_equal(rows.numpy(), held.dequantized()[places.numpy()])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({3: torch.zeros(34, M, dtype=torch.int8), 7: [16, 48]}, "inputs"),
        ({0: torch.zeros(2, N).half()}, "and x of"),
        ({1: torch.zeros(N - RANK, RANK, dtype=torch.int8)}, "do not fit blocks"),
        ({2: None}, "have scales"),
        ({5: torch.arange(N)}, "int32"),
        ({6: [4, 5]}, "5 bits"),
        ({7: [16, 0]}, "do not fit blocks"),
        ({7: [24, 48]}, "do not fit blocks"),
    ],
)
def test_misfits_are_refused(change: dict[int, Any], says: str) -> None:
    given, _ = operands("int4-b16-sym", "int8-row-sym")
    for place, value in change.items():
        given[place] = value
    with pytest.raises(ValueError, match=says):
        block_skip_linear_quantized(*given)


def test_the_kernels_compute_in_half_precision_alone() -> None:
    given, _ = operands("int4-b16-sym", "int8-row-sym")
    with pytest.raises(InputError, match="half precision"):
        _launch(*given)


@pytest.mark.gpu
@pytest.mark.parametrize("a", [None, "int4-b16-sym", "int8-row-sym"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_agrees_with_the_cpu(dtype: torch.dtype, a: str | None) -> None:
    for dense in (False, True):
        given, _ = operands(a, "int4-b64-sym", dense=dense)
        typed = [g.to(dtype) if getattr(g, "dtype", None) == torch.float32 else g for g in given]
        moved = [g.cuda() if isinstance(g, torch.Tensor) else g for g in typed]
        wide = [g.double() if getattr(g, "dtype", None) == dtype else g for g in typed]
        expected = block_skip_linear_quantized(*wide)
        y = block_skip_linear_quantized(*moved).cpu().double()
        assert (y - expected).norm() <= (1e-3 if dtype == torch.float16 else 1e-2) * expected.norm()
