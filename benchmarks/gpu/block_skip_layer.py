"""The kernel library on random layers: calls of every width and tactic, and their error.

python -m benchmarks.gpu.block_skip_layer --cases 200     # on a GPU; compute-sanitizer runs it
python -m benchmarks.gpu.block_skip_layer --device cpu --cases 50

Data are drawn on the CPU and copied, results start as NaN, and the reference is computed in
float64, so that on a GPU no kernel runs but ours.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import run
from benchmarks.gpu.random_errors import Errors, errors_command
from pipeline.errors import InputError
from pipeline.kernels.build import BLOCK_SKIP, KernelSources, build_library
from pipeline.kernels.interface import BF16, FP16, Device, Pointers, Problem, open_library
from trt_plugins.toolchain import local_nvcc

_TYPES = {torch.float16: FP16, torch.bfloat16: BF16}
TACTICS = 4
_GROUP = 128
_EMULATED = Path(__file__).parents[2] / "build" / "benchmarks"
# A chip of the emulation's own: what matters is that reductions are cut.
_EMULATED_DEVICE = Device(multiprocessors=4, capability=90)


@dataclass(frozen=True)
class Layer:
    """One layer to compute.

    Attributes:
        rows, n, m, rank: x [rows, n], y [rows, m], r pivots.
        dtype: of x, y, scales and 16-bit weights.
        bits: 16, 8 or 4.
        group: rows of the weights that share a scale; of 8 and 4 bits.
        indexed: whether x is out of order.
    """

    rows: int
    n: int
    m: int
    rank: int
    dtype: torch.dtype = torch.float16
    bits: int = 16
    group: int = _GROUP
    indexed: bool = True

    def weight_bytes(self) -> int:
        """Codes or numbers of both factors, and scales."""
        total = 0
        for rows, columns in ((self.n - self.rank, self.rank), (self.rank, self.m)):
            total += rows * -(-columns * self.bits // 8)
            total += 0 if self.bits == 16 else 2 * -(-rows // self.group) * columns
        return total

    def dense_bytes(self) -> int:
        """Of the matrix [m, n] in 16 bits."""
        return 2 * self.m * self.n


@dataclass
class _Factor:
    """A weight matrix as the kernels read it, and how to get its numbers back."""

    stored: torch.Tensor
    scale: torch.Tensor | None
    layer: Layer

    def numbers(self) -> torch.Tensor:
        """float64 [rows, columns]."""
        if self.scale is None:
            return self.stored.double()
        columns = self.scale.shape[1]
        codes = self.stored.view(torch.int8)
        if self.layer.bits == 4:
            pairs = torch.stack([self.stored & 15, self.stored >> 4], dim=-1)
            codes = (pairs.flatten(1)[:, :columns] ^ 8).to(torch.int8) - 8
        scales = self.scale.double().repeat_interleave(self.layer.group, 0)
        return codes.double() * scales[: codes.shape[0]]

    def pointer(self) -> int | None:
        """Address of the numbers; None where there are none."""
        return self.stored.data_ptr() or None

    def scale_pointer(self) -> int | None:
        """Address of the scales; None without."""
        return None if self.scale is None else self.scale.data_ptr() or None


def _random_factor(
    layer: Layer, rows: int, columns: int, where: str, random: torch.Generator
) -> _Factor:
    """Numbers of deviation 0.05, or uniform codes with scales about that large."""
    device = random.device

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device=device)

    if layer.bits == 16:
        return _Factor((0.05 * normal(rows, columns)).to(layer.dtype).to(where), None, layer)
    groups = -(-rows // layer.group)
    scale = (0.001 + 0.01 * normal(groups, columns).abs() * 0.05).to(layer.dtype)
    width = columns if layer.bits == 8 else (columns + 1) // 2
    codes = torch.randint(0, 256, (rows, width), generator=random, device=device, dtype=torch.uint8)
    if layer.bits == 8:
        codes = torch.where(codes == 128, torch.zeros_like(codes), codes)  # no -128
    return _Factor(codes.to(where), scale.to(where), layer)


class Call:
    """One layer with data of its own, in memory of a device, ready to be computed.

    Args:
        layer: what to compute.
        where: `cuda` or `cpu`.
        random: draws the data, on its own device.
    """

    def __init__(self, layer: Layer, where: str, random: torch.Generator) -> None:
        self.layer = layer
        self.a = _random_factor(layer, layer.n - layer.rank, layer.rank, where, random)
        self.b = _random_factor(layer, layer.rank, layer.m, where, random)
        shape = (layer.rows, layer.n)
        drawn = torch.randn(shape, generator=random, device=random.device)
        self.x = drawn.to(layer.dtype).to(where)
        order = torch.randperm(layer.n, generator=random, device=random.device)
        self.index = order.to(torch.int32).to(where) if layer.indexed else None
        nothing = torch.full((layer.rows, layer.m), float("nan"), dtype=layer.dtype)
        self.y = nothing.to(where)

    def reference(self, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The result in float64, computed on `where`, z rounded nowhere.

        Returns:
            It, and the size that each number has when its terms have random signs: what rounding
            does to a sum has the size of its terms, even where they cancel.
        """
        x = self.x.to(where).double()
        if self.index is not None:
            x = x.index_select(1, self.index.to(where).long())
        rank = self.layer.rank
        a, b = (
            _Factor(
                factor.stored.to(where),
                None if factor.scale is None else factor.scale.to(where),
                self.layer,
            ).numbers()
            for factor in (self.a, self.b)
        )
        squares = (x[:, :rank].square() + x[:, rank:].square() @ a.square()) @ b.square()
        return (x[:, :rank] + x[:, rank:] @ a) @ b, squares.sqrt()

    def error(self, where: str = "cpu") -> float:
        """Frobenius error of `y` by the size of its terms; NaN where a number was not written."""
        exact, size = self.reference(where)
        difference = self.y.to(where).double() - exact
        return (difference.norm() / size.norm()).item()


class Kernels:
    """The kernel library on one device: `cuda` by nvcc, `cpu` by the emulation."""

    def __init__(self, where: str) -> None:
        self.where = where
        if where == "cuda":
            properties = torch.cuda.get_device_properties(0)
            capability = 10 * properties.major + properties.minor
            self.device = Device(properties.multi_processor_count, capability)
            path = build_library(capability)
        else:
            self.device = _EMULATED_DEVICE
            path = emulated_library(BLOCK_SKIP)
        self.library = open_library(path)

    def prepare(self, call: Call, tactic: int) -> _PreparedCall:
        """Scratch memory and arguments of a call.

        Raises:
            InputError: the library refuses the problem.
        """
        layer = call.layer
        bits, group = (0, 0) if layer.bits == 16 else (layer.bits, layer.group)
        problem = Problem(
            rows=layer.rows, n=layer.n, m=layer.m, rank=layer.rank, type=_TYPES[layer.dtype],
            a_weights=bits, a_group=group, b_weights=bits, b_group=group,
            indexed=layer.indexed, tactic=tactic,
        )  # fmt: skip
        refusal = self.library.skipcatWhyRefused(ctypes.byref(problem))
        if refusal is not None:
            raise InputError("The kernels refuse this layer.", observed=refusal.decode())
        pointers = Pointers(
            x=call.x.data_ptr(),
            index=None if call.index is None else call.index.data_ptr(),
            a=call.a.pointer(),
            a_scale=call.a.scale_pointer(),
            b=call.b.pointer(),
            b_scale=call.b.scale_pointer(),
            y=call.y.data_ptr(),
        )
        needed = self.library.skipcatWorkspaceBytes(
            ctypes.byref(problem), ctypes.byref(self.device)
        )
        counters = self.library.skipcatCounterBytes(ctypes.byref(problem))
        return _PreparedCall(
            self,
            problem,
            pointers,
            torch.empty(needed, dtype=torch.uint8).to(self.where),
            torch.zeros(counters, dtype=torch.uint8).to(self.where),
            call,
        )


@dataclass
class _PreparedCall:
    """A call that only has to be launched; it keeps all its memory alive."""

    kernels: Kernels
    problem: Problem
    pointers: Pointers
    workspace: torch.Tensor
    counters: torch.Tensor
    call: Call

    def __call__(self) -> None:
        """Launch on the current stream."""
        on_gpu = self.kernels.where == "cuda"
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
        status = self.kernels.library.skipcatBlockSkipLinear(
            ctypes.byref(self.problem), ctypes.byref(self.pointers),
            ctypes.byref(self.kernels.device), self.workspace.data_ptr(),
            self.counters.data_ptr(), stream,
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(f"the block-skip kernel failed: CUDA error {status}")


def _cuda_toolkit() -> Path:
    """The folder of CUDA's headers and libraries; raise InputError where there is none."""
    nvcc = local_nvcc()
    places = [nvcc.resolve().parents[2]] if nvcc else []
    for place in (*places, *sorted(Path("/usr/local").glob("cuda*"))):
        if (place / "include" / "cuda_fp16.h").is_file():
            return place
    raise InputError("The emulation needs CUDA's headers.", change="install the CUDA toolkit")


@cache
def emulated_library(kernels: KernelSources) -> Path:
    """The same sources as for a GPU, compiled for the CPU, where every CUDA thread is a fiber.

    Raises:
        InputError: there are no CUDA headers, or g++ fails.
    """
    toolkit = _cuda_toolkit()
    _EMULATED.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for folder in kernels.folders:
        for path in sorted(folder.rglob("*.[ch]*")):
            digest.update(path.read_bytes())
    target = _EMULATED / f"{kernels.name}_emulated-{digest.hexdigest()[:16]}.so"
    if not target.is_file():
        _compile_emulation(toolkit, target, kernels)
    return target


def _compile_emulation(toolkit: Path, target: Path, kernels: KernelSources) -> None:
    """Run g++; `target` appears only when it succeeded, so that two may do it at once."""
    aside = target.with_suffix(f".{os.getpid()}")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DSKIPCAT_EMULATE"]
    command += [f"-I{folder}" for folder in kernels.folders]
    command += ["-isystem", str(toolkit / "include"), "-x", "c++"]
    command += [str(kernels.find(name)) for name in kernels.sources]
    command += ["-x", "none", f"-L{toolkit / 'lib64'}", "-lcudart_static", "-ldl", "-lrt"]
    command += ["-lpthread", "-o", str(aside)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise InputError("g++ cannot compile the emulation.", observed=answer.stderr[-800:])
    aside.replace(target)


def _random_layer(random: torch.Generator, small: bool) -> Layer:
    """Any layer: odd and even sizes, one row to many, every type and width."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    unit = (1, 16, 16)[pick(0, 2)]
    rows = ((1, 1), (1, 1), (2, 8), (9, 64), (65, 140 if small else 4096))[pick(0, 4)]
    widest = 600 if small else (8192 if rows[1] <= 8 else 1024)
    n = unit * pick(1, max(1, widest // unit))
    rank = n if pick(0, 9) == 0 else unit * pick(1, n // unit)
    m = unit * pick(1, max(1, (200 if small else 1024) // unit))
    return Layer(
        rows=pick(*rows), n=n, m=m, rank=rank,
        dtype=(torch.float16, torch.bfloat16)[pick(0, 1)],
        bits=(16, 16, 8, 4)[pick(0, 3)], group=16 * pick(1, 8), indexed=pick(0, 1) == 1,
    )  # fmt: skip


def measure_errors(kernels: Kernels, cases: int, seed: int) -> dict[str, Any]:
    """Errors of random layers by random tactics: the worst of each type and width, all beyond."""
    random = torch.Generator().manual_seed(seed)
    errors = Errors(cases, seed)
    for _ in range(cases):
        layer = _random_layer(random, kernels.where == "cpu")
        tactic = int(torch.randint(0, TACTICS, (1,), generator=random))
        call = Call(layer, kernels.where, random)
        kernels.prepare(call, tactic)()
        errors.add("layer", layer, f"{layer.bits} bits", call.error(), tactic=tactic)
    return errors.record()


command = errors_command("layers", lambda device: partial(measure_errors, Kernels(device)))


if __name__ == "__main__":
    sys.exit(run(command))
