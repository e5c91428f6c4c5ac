"""`skipcat::block_skip_linear`, a PyTorch operator on the CPU and on NVIDIA GPUs.

    y = (x1 + x2 a) b,  [x1 x2] = x[..., index]

x [..., n], a [n - r, r], b [r, m], index int32 [n] or None, y [..., m]. On a GPU it is the kernel
of `trt_plugins/block_skip`, compiled when it is first called, and for many rows two products of
cuBLAS; on the CPU, and for gradients, four operations of PyTorch. It has a shape function, so
`torch.compile` and CUDA graphs work through it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from pipeline.errors import InputError, ResourceError
from pipeline.kernels.build import build_library
from pipeline.kernels.interface import (
    BF16,
    FLOAT_WEIGHTS,
    FP16,
    Device,
    Pointers,
    Problem,
    open_library,
)

_TYPES = {torch.float16: FP16, torch.bfloat16: BF16}
_CUDA_MOST_ROWS = 4096
# With more rows than the kernel's decode step takes, two products of cuBLAS take 0.3 to 0.45 of
# our tiles' time on an H100 (benchmarks/results/gpu.json, prefill layers).
_CUBLAS_ROWS = 8
# From so many weights to a multiprocessor on, two blocks on each decode faster than one (likewise,
# decode layers): tactic 1 of `block_skip.h`.
_TWO_BLOCKS_WEIGHTS = 120_000


@torch.library.custom_op("skipcat::block_skip_linear", mutates_args=(), device_types="cpu")
def block_skip_linear(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the layer.

    Args:
        x: inputs, [..., n].
        a: A' transposed, [n - r, r], of the type of x.
        b: B' transposed, [r, m], of the type of x.
        index: int32 [n], the order of the inputs with the r pivots first; None when x has it.

    Returns:
        [..., m], of the type of x.

    Raises:
        ValueError: shapes or types that do not fit.
        InputError: on a GPU, the kernels cannot be compiled, or do not know the type.
    """
    _require_fit(x, a, b, index)
    latent, _ = mix(x, a, index)
    return latent @ b


@block_skip_linear.register_fake
def _shape_of_result(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """An empty result: what compilers ask for."""
    _require_fit(x, a, b, index)
    return x.new_empty((*x.shape[:-1], b.shape[1]))


def mix(
    x: torch.Tensor, a: torch.Tensor, index: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latent z = x1 + x2 a, [..., r], and x2, [..., n - r]."""
    rank = a.shape[1]
    ordered = x if index is None else x.index_select(-1, index)
    rest = ordered[..., rank:]
    return ordered[..., :rank] + rest @ a, rest


def _require_fit(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor | None
) -> None:
    """Raise ValueError when shapes or types do not fit."""
    shapes = f"x {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}"
    if x.dim() == 0 or a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"{shapes}: x needs a dimension, a and b two")
    if a.shape[1] != b.shape[0] or x.shape[-1] != a.shape[0] + a.shape[1]:
        raise ValueError(f"{shapes} do not fit: x [..., n], a [n - r, r], b [r, m]")
    if not x.dtype == a.dtype == b.dtype:
        raise ValueError(f"x {x.dtype}, a {a.dtype} and b {b.dtype} must be of one type")
    if index is not None and (index.shape != x.shape[-1:] or index.dtype != torch.int32):
        raise ValueError(f"index must be int32 [{x.shape[-1]}], not {index.dtype} {index.shape}")


def _save_for_gradient(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    output: torch.Tensor,
) -> None:
    """Keep the inputs; the latent is computed again."""
    del output
    ctx.save_for_backward(*inputs)  # type: ignore[arg-type] # None is fine


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
    """With dz = dy bᵀ: dx[index] = [dz, dz aᵀ]; da = x2ᵀ dz; db = zᵀ dy, summed over rows.

    Factors that are frozen, as beside adapters, cost no product of theirs.
    """
    x, a, b, index = ctx.saved_tensors  # type: ignore[attr-defined]
    for_x, for_a, for_b = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
    grad_latent = grad @ b.T
    grad_x = grad_a = grad_b = None
    if for_x:
        grad_x = torch.cat([grad_latent, grad_latent @ a.T], dim=-1)
        if index is not None:
            grad_x = torch.zeros_like(x).index_copy(-1, index.long(), grad_x)
    if for_a or for_b:
        latent, rest = mix(x, a, index)
        if for_a:
            grad_a = rest.flatten(0, -2).T @ grad_latent.flatten(0, -2)
        if for_b:
            grad_b = latent.flatten(0, -2).T @ grad.flatten(0, -2)
    return grad_x, grad_a, grad_b, None


block_skip_linear.register_autograd(_gradients, setup_context=_save_for_gradient)


@block_skip_linear.register_kernel("cuda")
def _launch(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, index: torch.Tensor | None = None
) -> torch.Tensor:
    """The kernel for few rows, which reads the weights once; for more cuBLAS, which is quicker."""
    _require_fit(x, a, b, index)
    if x.dtype in _TYPES and x.numel() > _CUBLAS_ROWS * x.shape[-1]:
        ordered = (x if index is None else x.index_select(-1, index)).flatten(0, -2)
        rank = a.shape[1]
        latent = torch.addmm(ordered[:, :rank], ordered[:, rank:], a)
        return (latent @ b).reshape(*x.shape[:-1], b.shape[1])
    return launch(x, Held(a.contiguous()), Held(b.contiguous()), index, b.shape[1])


@dataclass(frozen=True)
class Held:
    """One of the layer's matrices [rows, columns], as the kernels read it.

    Attributes:
        stored: numbers of the type of x, or codes: int8 [rows, columns] or, of 4 bits,
            [rows, (columns + 1) / 2].
        scale: of codes, of the type of x, [(rows + block - 1) / block, columns].
        bits: of codes, 4 or 8.
        block: rows that share a scale, a multiple of 16.
    """

    stored: torch.Tensor
    scale: torch.Tensor | None = None
    bits: int = FLOAT_WEIGHTS
    block: int = 0

    @property
    def address(self) -> int | None:
        """Of what is stored; None where that is nothing."""
        return self.stored.data_ptr() or None

    @property
    def scale_address(self) -> int | None:
        """Of the scales."""
        return None if self.scale is None else self.scale.data_ptr() or None


def launch(
    x: torch.Tensor, a: Held | None, b: Held, index: torch.Tensor | None, width: int
) -> torch.Tensor:
    """The kernel, on the current stream of x's device; more than 4096 rows go in several calls.

    Args:
        x: inputs, [..., n].
        a: A' transposed; None for a dense layer, y = x b.
        b: B' transposed, [r, m], contiguous as a is.
        index: int32 [n], or None.
        width: m.

    Returns:
        [..., m], of the type of x.

    Raises:
        InputError: the kernels do not know the type of x, or refuse the layer.
    """
    if x.dtype not in _TYPES:
        raise InputError(
            "The block-skip kernels compute in half precision.",
            observed=f"x of {x.dtype}",
            expected="torch.float16 or torch.bfloat16",
        )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty((rows.shape[0], width), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        for part, out in zip(rows.split(_CUDA_MOST_ROWS), y.split(_CUDA_MOST_ROWS), strict=True):
            if part.shape[0]:
                _launch_rows(part, a, b, index, out)
    return y.reshape(*x.shape[:-1], width)


def _launch_rows(
    x: torch.Tensor, a: Held | None, b: Held, index: torch.Tensor | None, y: torch.Tensor
) -> None:
    """One call of the library: x [rows, n] to y [rows, m], all contiguous, 1 <= rows <= 4096.

    Raises:
        InputError: the library refuses the problem.
    """
    device = _device_of(x.device.index)
    library = _library_for(device.capability)
    problem = Problem(
        rows=x.shape[0],
        n=x.shape[1],
        m=y.shape[1],
        rank=b.stored.shape[0],
        type=_TYPES[x.dtype],
        a_weights=FLOAT_WEIGHTS if a is None else a.bits,
        a_group=0 if a is None else a.block,
        b_weights=b.bits,
        b_group=b.block,
        indexed=index is not None,
    )
    weights = problem.rank * (problem.m + problem.n - problem.rank)
    problem.tactic = int(weights >= _TWO_BLOCKS_WEIGHTS * device.multiprocessors)
    refusal = library.skipcatWhyRefused(ctypes.byref(problem))
    if refusal is not None:
        raise InputError("The block-skip kernels refuse this layer.", observed=refusal.decode())
    needed = library.skipcatWorkspaceBytes(ctypes.byref(problem), ctypes.byref(device))
    workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
    stream = torch.cuda.current_stream().cuda_stream
    counters = _counters_for(x.device.index, stream, _counter_numbers(library, problem))
    pointers = Pointers(
        x=x.data_ptr(),
        index=None if index is None else index.data_ptr(),
        a=None if a is None else a.address,
        a_scale=None if a is None else a.scale_address,
        b=b.address,
        b_scale=b.scale_address,
        y=y.data_ptr(),
    )
    status = library.skipcatBlockSkipLinear(
        ctypes.byref(problem), ctypes.byref(pointers), ctypes.byref(device),
        workspace.data_ptr(), counters, stream,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"the block-skip kernel failed: CUDA error {status}")


@cache
def _device_of(index: int) -> Device:
    """What the library must know of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    return Device(multiprocessors=properties.multi_processor_count, capability=capability)


def prepare(device: int) -> None:
    """Compile and load the kernels for a GPU now, so that whatever is wrong is said before work.

    Raises:
        InputError: as `build_library`.
    """
    _library_for(_device_of(device).capability)


@cache
def _library_for(capability: int) -> ctypes.CDLL:
    """The library for GPUs of a capability, compiled if need be."""
    return open_library(build_library(capability))


def _counter_numbers(library: ctypes.CDLL, problem: Problem) -> int:
    """Counters of a call, rounded up to a power of two so that few sizes are ever kept."""
    numbers: int = library.skipcatCounterBytes(ctypes.byref(problem)) // 4
    return 1 << (numbers - 1).bit_length()


@cache
def _counters_for(device: int, stream: int, numbers: int) -> int:
    """Address of the counters of one stream: calls on it cannot overlap, and each leaves them zero.

    They outlive the call, so PyTorch's allocator must not make them: while `torch.compile` warms up
    for CUDA graphs, it hands out memory of a pool in which it tolerates nothing that stays.

    Raises:
        InputError: the stream is being captured: the warm-up run that capturing needs was left out.
        ResourceError: the GPU's memory is full.
    """
    if torch.cuda.is_current_stream_capturing():
        raise InputError(
            "A CUDA graph is captured of a block-skip layer that never ran on its stream.",
            where=f"cuda:{device}, stream {stream:#x}",
            change="run the layer once on the stream that captures, before capturing",
        )
    library = _library_for(_device_of(device).capability)
    return _make_counters(library, device, 4 * numbers)


def _make_counters(library: ctypes.CDLL, device: int, size_bytes: int) -> int:
    """Address of zeroed memory on a GPU that stays for the life of the process.

    Raises:
        ResourceError: CUDA does not give it.
    """
    address = ctypes.c_void_p()
    status = library.skipcatMakeCounters(device, size_bytes, ctypes.byref(address))
    if status != 0 or not address.value:
        raise ResourceError(
            "The GPU gives no memory for the counters of the block-skip kernels.",
            where=f"cuda:{device}",
            observed=f"CUDA error {status} for {size_bytes} bytes",
            change="free some of the GPU's memory",
        )
    return address.value
