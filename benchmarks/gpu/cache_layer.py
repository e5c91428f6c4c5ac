"""The library of latent attention on random caches: calls of every form, and their error.

    python -m benchmarks.gpu.cache_layer --cases 100     # on a GPU; compute-sanitizer runs it
    python -m benchmarks.gpu.cache_layer --device cpu --cases 10

Places that the mask closes to all queries hold NaN, as results do before they are written. The
reference is computed in float64.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.command import run
from benchmarks.gpu.block_skip_layer import emulated_library
from benchmarks.gpu.random_errors import Errors, errors_command
from pipeline.errors import InputError
from pipeline.kernels.build import LATENT_ATTENTION, build_library
from pipeline.kernels.interface import LatentPointers, LatentProblem, open_latent_library

_EMULATED_MULTIPROCESSORS = 4
_CLOSED = -32768.0
_THETA = 1e4
_FORMS = {16: 0, 8: 8, 4: 4}  # bits of a number, and the library's name for it


@dataclass(frozen=True)
class CacheShape:
    """One call of attention over a cache, batch 1.

    Attributes:
        heads, kv_heads, queries, places: of which the last `closed` hold nothing yet.
        key_rank, value_rank: numbers of a latent of one kv head.
        width: of a query; that of the keys' latents unless keys are rebuilt.
        rebuilt: keys are K = L U, turned by their place; else the query is as wide as a latent.
        key_bits, value_bits: 16 of numbers, 8 or 4 of codes.
        dtype: of numbers.
        closed: places behind the last query.
    """

    heads: int
    kv_heads: int
    queries: int
    places: int
    key_rank: int
    value_rank: int
    width: int
    rebuilt: bool = False
    key_bits: int = 16
    value_bits: int = 16
    dtype: torch.dtype = torch.float16
    closed: int = 0

    def read_bytes(self) -> int:
        """Of all latents, with their steps."""
        total = 0
        for rank, bits in ((self.key_rank, self.key_bits), (self.value_rank, self.value_bits)):
            total += rank * bits // 8 + (0 if bits == 16 else 4)
        return total * self.kv_heads * self.places


class _Side:
    """Latents [kv heads, places, rank] as the kernels read them."""

    def __init__(
        self, shape: CacheShape, rank: int, bits: int, where: str, random: torch.Generator
    ) -> None:
        size = (shape.kv_heads, shape.places)
        self.bits = bits
        self.steps: torch.Tensor | None = None
        open_places = shape.places - shape.closed
        if bits == 16:
            drawn = torch.randn(*size, rank, generator=random, device=random.device)
            drawn[:, open_places:] = torch.nan
            self.held = drawn.to(shape.dtype).to(where)
            return
        drawn = 2 + 2 * torch.rand(*size, 2, generator=random, device=random.device)
        steps = drawn * torch.tensor([1 / (2**bits - 1), -0.5], device=random.device)
        steps[:, open_places:] = torch.nan
        self.steps = steps.half().to(where)
        codes = torch.randint(
            -128, 128, (*size, rank * bits // 8), generator=random, device=random.device,
            dtype=torch.int8,
        )  # fmt: skip
        self.held = codes.to(where)

    def numbers(self) -> torch.Tensor:
        """float64 [kv heads, places, rank]."""
        if self.steps is None:
            return self.held.double()
        codes = self.held.to(torch.int16) + 128
        if self.bits == 4:
            codes = torch.cat([codes % 16, codes // 16], dim=-1)
        steps = self.steps.double()
        return codes * steps[..., :1] + steps[..., 1:]

    def step_pointer(self) -> int | None:
        """Address of the steps; None of numbers."""
        return None if self.steps is None else self.steps.data_ptr()


class CacheCall:
    """One call with data of its own, in memory of a device.

    Args:
        shape: what to compute.
        where: `cuda` or `cpu`.
        random: draws the data, on its own device.
    """

    def __init__(self, shape: CacheShape, where: str, random: torch.Generator) -> None:
        def normal(*size: int, spread: float = 1.0) -> torch.Tensor:
            drawn = spread * torch.randn(size, generator=random, device=random.device)
            return drawn.to(shape.dtype).to(where)

        self.shape = shape
        self.query = normal(shape.heads, shape.queries, shape.width, spread=shape.width**-0.5)
        self.keys = _Side(shape, shape.key_rank, shape.key_bits, where, random)
        self.values = _Side(shape, shape.value_rank, shape.value_bits, where, random)
        place = torch.arange(shape.places)
        last = shape.places - shape.closed - shape.queries + torch.arange(shape.queries)
        closed = place > last[:, None]
        self.mask = (closed * _CLOSED).to(shape.dtype).to(where)
        self.tables: dict[str, torch.Tensor] = {}
        if shape.rebuilt:
            up = (shape.kv_heads, shape.key_rank, shape.width)
            angles = place.double()[:, None] * _THETA ** -torch.linspace(0, 1, shape.width // 2)
            self.tables = {
                "up": normal(*up, spread=shape.key_rank**-0.5),
                "mean": normal(shape.kv_heads, shape.width, spread=0.5),
                "cos": angles.cos().float().to(where),
                "sin": angles.sin().float().to(where),
            }
        size = (shape.heads, shape.queries, shape.value_rank)
        self.mixed = torch.full(size, torch.nan, dtype=shape.dtype).to(where)

    def _rebuilt_keys(self, latents: torch.Tensor) -> torch.Tensor:
        up, mean, cos, sin = (table.double() for table in self.tables.values())
        first, second = (latents @ up + mean[:, None]).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64, of the places that are open: the result [heads, queries, value rank].

        And the size that it has when its terms have random signs: a sum may cancel to nothing, and
        what rounding does to it still has the size of its terms. What a score is off by counts with
        its weight, and has the size of the score's own terms.
        """
        shape = self.shape
        opened = shape.places - shape.closed
        keys, values = self.keys.numbers(), self.values.numbers()[:, :opened]
        if shape.rebuilt:
            keys = self._rebuilt_keys(keys)
        keys = keys[:, :opened]
        query = self.query.double().reshape(shape.kv_heads, -1, shape.width)
        scores = (query @ keys.mT).unflatten(1, (-1, shape.queries))
        weights = (scores + self.mask[:, :opened].double()).softmax(-1).flatten(1, 2)
        sizes = 1 + query.square() @ keys.square().mT
        squares = (weights.square() * sizes) @ values.square().sum(-1, keepdim=True)
        mixed = (weights @ values).reshape(shape.heads, shape.queries, shape.value_rank)
        return mixed, squares.sum().sqrt()

    def error(self) -> float:
        """Error of what `mixed` holds, by that size; NaN where it was not written."""
        exact, size = self.reference()
        return ((self.mixed.double() - exact).norm() / size).item()


class CacheKernels:
    """The library on one device: `cuda` by nvcc, `cpu` by the emulation."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.multiprocessors = _EMULATED_MULTIPROCESSORS
        if where == "cuda":
            properties = torch.cuda.get_device_properties(0)
            self.multiprocessors = properties.multi_processor_count
            path = build_library(10 * properties.major + properties.minor, LATENT_ATTENTION)
        else:
            path = emulated_library(LATENT_ATTENTION)
        self.library = open_latent_library(path)

    def prepare(self, call: CacheCall) -> _PreparedCall:
        """Scratch memory and arguments of a call.

        Raises:
            InputError: the library refuses the problem.
        """
        shape = call.shape
        problem = LatentProblem(
            batch=1, heads=shape.heads, queries=shape.queries, slots=shape.places,
            width=shape.width, heads_per_group=int(shape.rebuilt),
            key_groups=shape.kv_heads, key_held=call.keys.held.shape[-1],
            key_form=_FORMS[shape.key_bits],
            value_groups=shape.kv_heads, value_held=call.values.held.shape[-1],
            value_form=_FORMS[shape.value_bits],
            mask_by_row=False, bf16=shape.dtype == torch.bfloat16,
        )  # fmt: skip
        refusal = self.library.skipcatLatentWhyRefused(ctypes.byref(problem))
        if refusal is not None:
            raise InputError("The kernels refuse this cache.", observed=refusal.decode())
        pointers = LatentPointers(
            query=call.query.data_ptr(), mask=call.mask.data_ptr(),
            keys=call.keys.held.data_ptr(), key_steps=call.keys.step_pointer(),
            values=call.values.held.data_ptr(), value_steps=call.values.step_pointer(),
            mixed=call.mixed.data_ptr(),
            **{name: table.data_ptr() for name, table in call.tables.items()},
        )  # fmt: skip
        needed = self.library.skipcatLatentWorkspaceBytes(
            ctypes.byref(problem), self.multiprocessors
        )
        workspace = torch.empty(needed, dtype=torch.uint8).to(self.where)
        return _PreparedCall(self, problem, pointers, workspace, call)


@dataclass
class _PreparedCall:
    """A call that only has to be launched; it keeps all its memory alive."""

    kernels: CacheKernels
    problem: LatentProblem
    pointers: LatentPointers
    workspace: torch.Tensor
    call: CacheCall

    def __call__(self) -> None:
        """Launch on the current stream."""
        on_gpu = self.kernels.where == "cuda"
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
        status = self.kernels.library.skipcatLatentAttention(
            ctypes.byref(self.problem), ctypes.byref(self.pointers), self.kernels.multiprocessors,
            self.workspace.data_ptr(), stream,
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(f"the latent-attention kernel failed: CUDA error {status}")


def _random_shape(random: torch.Generator, small: bool) -> CacheShape:
    """Any cache: one head or many, one place to thousands, odd ranks, every form and type."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    kv_heads = pick(1, 3 if small else 8)
    unit = (1, 16, 16)[pick(0, 2)]
    bits = [(16, 8, 4)[pick(0, 2)] for _ in range(2)]
    ranks = [unit * pick(1, 128 // unit) * (2 if width == 4 else 1) for width in bits]
    queries = pick(1, 8) if pick(0, 2) == 0 else 1
    places = queries + pick(0, (60, 300, 300 if small else 5000)[pick(0, 2)])
    rebuilt = pick(0, 1) == 1
    return CacheShape(
        heads=kv_heads * pick(1, 4 if small else 8), kv_heads=kv_heads, queries=queries,
        places=places, key_rank=ranks[0], value_rank=ranks[1],
        width=16 * pick(1, 8) if rebuilt else ranks[0], rebuilt=rebuilt,
        key_bits=bits[0], value_bits=bits[1],
        dtype=(torch.float16, torch.float16, torch.bfloat16)[pick(0, 2)],
        closed=pick(0, places - queries),
    )  # fmt: skip


def measure_cache_errors(kernels: CacheKernels, cases: int, seed: int) -> dict[str, Any]:
    """Errors of random caches: the worst of each type and form, all beyond their bound."""
    random = torch.Generator().manual_seed(seed)
    errors = Errors(cases, seed)
    for _ in range(cases):
        shape = _random_shape(random, kernels.where == "cpu")
        call = CacheCall(shape, kernels.where, random)
        kernels.prepare(call)()
        form = "rebuilt" if shape.rebuilt else "narrow"
        errors.add("cache", shape, f"{form}, {shape.key_bits} bits", call.error())
    return errors.record()


command = errors_command(
    "caches", lambda device: partial(measure_cache_errors, CacheKernels(device))
)


if __name__ == "__main__":
    sys.exit(run(command))
