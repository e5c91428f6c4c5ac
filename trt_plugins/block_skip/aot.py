"""The layer as kernels inside the engine: TensorRT's quick-deploy plugins, compiled ahead of time.

    skipcat::BlockSkipMix(x, a) -> z                 z = x1 + x2 a,  [x1 x2] = x
    skipcat::BlockSkipMixIndexed(x, a, index) -> z   the same on x[..., index]
    skipcat::BlockSkipProduct(z, b) -> y             y = z b

x [..., n], a [n - r, r], index int32 [n], z [..., r], b [r, m], y [..., m], all fp16 or all bf16.
Two ops because an embedded kernel is one launch, has no scratch memory, and no block may wait for
another. `_kernel_of` and `_launch_of` are pure; `register` hands them to TensorRT (10.9 or newer),
which embeds the PTX of the fastest tactic and needs neither Python nor a library afterwards.
"""

# No `from __future__ import annotations`: TensorRT reads the annotations of the functions in
# `_register_ops` as types.

import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pipeline.errors import InputError, MissingPackageError
from trt_plugins.toolchain import WORK, find_nvcc, local_nvcc, require_capability, run_nvcc

_SOURCE_FOLDER = Path(__file__).parent
_NAMESPACE = "skipcat"
MIX, MIX_INDEXED, PRODUCT = "BlockSkipMix", "BlockSkipMixIndexed", "BlockSkipProduct"
OLDEST_TENSORRT = (10, 9)

_FloatType = Literal["fp16", "bf16"]
_CUDA_TYPES: dict[_FloatType, str] = {"fp16": "__half", "bf16": "__nv_bfloat16"}
# Rows that a block takes, by tactic; TensorRT times them and keeps the fastest. Each is right for
# any number of rows. TensorRT counts tactics from 1.
_TACTIC_ROWS = {1: 8, 2: 32, 3: 64}
_DECODE_ROWS = 8
_THREADS = 256
# As in aot.cuh, which the emulated run checks them against.
_DECODE_COLUMNS, _TILE_COLUMNS = 64, 128
_DECODE_SHARED_BYTES = 2 * _DECODE_ROWS * (1920 + 4) + 16
_RING_STAGES = {32: 4, 64: 3}


@dataclass(frozen=True)
class _AotProduct:
    """One of the layer's two products.

    Attributes:
        op: `MIX`, `MIX_INDEXED` or `PRODUCT`.
        dtype: of x, weights and result; sums are float32.
        reduction: rows of the weights.
        columns: columns of the weights, and of the result.
    """

    op: str
    dtype: _FloatType
    reduction: int
    columns: int


@dataclass(frozen=True)
class _AotKernel:
    """One instance of `aot.cu`: its entry's name, and the definitions that make it."""

    name: str
    definitions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _AotLaunch:
    """How a kernel is launched.

    Attributes:
        column_blocks: blocks over the columns of the result.
        rows_of_block: rows of the result that a block takes.
        rows_first: whether grid x counts rows and grid y columns, or the other way round.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block; at most 48 KB, as TensorRT does not say
            that it would ask for more.
    """

    column_blocks: int
    rows_of_block: int
    rows_first: bool
    threads: int
    shared_bytes: int

    def grid(self, rows: int) -> tuple[int, int]:
        """Blocks in x and y for a number of rows; what TensorRT evaluates symbolically."""
        row_blocks = -(-rows // self.rows_of_block)
        pair = (row_blocks, self.column_blocks)
        return pair if self.rows_first else pair[::-1]


def _kernel_of(product: _AotProduct, tactic: int) -> _AotKernel:
    """The kernel that computes a product by a tactic.

    Rows of the weights are read 16 bytes at a time where `columns` is a multiple of 8, and inputs
    are copied 16 bytes at a time where they are in order and their rows and halves aligned.
    """
    rows = _TACTIC_ROWS[tactic]
    mixes = product.op != PRODUCT
    indexed = product.op == MIX_INDEXED
    vector = product.columns % 8 == 0
    aligned = product.reduction % 8 == 0 and not (mixes and not vector)
    gather = rows != _DECODE_ROWS and (indexed or not aligned)
    parts = ["skipcat", {MIX: "mix", MIX_INDEXED: "mix_indexed", PRODUCT: "product"}[product.op]]
    parts += [product.dtype, f"rows{rows}", *["vector"] * vector, *["gather"] * gather]
    definitions = {
        "NAME": "_".join(parts),
        "TYPE": _CUDA_TYPES[product.dtype],
        "MIX": str(mixes).lower(),
        "INDEXED": str(int(indexed)),
        "VECTOR": str(vector).lower(),
        "TILE_ROWS": str(rows),
        "GATHER": str(gather).lower(),
    }
    return _AotKernel("_".join(parts), tuple(definitions.items()))


def _launch_of(product: _AotProduct, tactic: int) -> _AotLaunch:
    """Grid and shared memory of `kernel_of(product, tactic)`, for any number of rows."""
    rows = _TACTIC_ROWS[tactic]
    decodes = rows == _DECODE_ROWS
    return _AotLaunch(
        column_blocks=-(-product.columns // (_DECODE_COLUMNS if decodes else _TILE_COLUMNS)),
        rows_of_block=rows,
        rows_first=not decodes,
        threads=_THREADS,
        shared_bytes=_DECODE_SHARED_BYTES if decodes else _tile_shared_bytes(rows),
    )


def _tile_shared_bytes(rows: int) -> int:
    """Ring of tiles of the inputs [rows, 32] and weights [32, 128], rows padded by 8 numbers."""
    return _RING_STAGES[rows] * (rows * (32 + 8) + 32 * (_TILE_COLUMNS + 8)) * 2


@cache
def _chosen_nvcc() -> Path:
    """The CUDA compiler that `make plugin` would take, from this machine or PyPI.

    Raises:
        InputError: there is none, it is too old, or this is no checkout to keep one in.
    """
    if local_nvcc() is None and not (WORK.parents[1] / "Makefile").is_file():
        raise InputError(
            "There is no CUDA compiler here, and no checkout to keep one from PyPI in.",
            where=WORK.parents[1],
            change="install the CUDA toolkit, set CUDA_HOME, or run from a clone of the repository",
        )
    try:
        return find_nvcc(WORK, os.environ).path
    except InputError as error:
        raise InputError(
            "There is no CUDA compiler for the embedded kernels.",
            observed=error,
            change="install the CUDA toolkit, or set CUDA_HOME",
        ) from error


@cache
def _compile_ptx(kernel: _AotKernel, capability: int, nvcc: Path) -> str:
    """PTX of one kernel for GPUs of `capability` (87 is 8.7) and newer.

    Raises:
        InputError: the GPU is too old, or nvcc fails; the message has its output.
    """
    require_capability(capability)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.ptx"
        arguments = ["-ptx", f"-arch=compute_{capability}"]
        arguments += [f"-DSKIPCAT_AOT_{name}={value}" for name, value in kernel.definitions]
        arguments += [str(_SOURCE_FOLDER / "aot.cu"), "-o", str(target)]
        run_nvcc(nvcc, arguments, kernel.name)
        return target.read_text(encoding="utf-8")


def _require_embedding(library: ModuleType) -> None:
    """Raise InputError when this TensorRT cannot embed kernels of Python plugins.

    Args:
        library: the imported TensorRT module.
    """
    version = tuple(int(part) for part in library.__version__.split(".")[:2])
    if version < OLDEST_TENSORRT or not hasattr(library, "QuickPluginCreationRequest"):
        raise InputError(
            "This TensorRT cannot embed kernels in an engine.",
            observed=f"{library.__name__} {library.__version__}",
            expected="tensorrt 10.9 or newer",
            change="use the plugin library (make plugin), or a newer TensorRT: "
            "JetPack 7 brings one, JetPack 6 does not",
        )


def _load_tensorrt() -> ModuleType:
    """The module `tensorrt`, with quick-deploy plugins.

    Raises:
        InputError: it is too old, or lacks `tensorrt.plugin`.
        MissingPackageError: it is not installed.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise MissingPackageError("tensorrt", "trt", "embed kernels in an engine") from error
    _require_embedding(tensorrt)
    try:
        import tensorrt.plugin
    except ImportError as error:
        raise InputError(
            "This TensorRT has no quick-deploy plugins.",
            observed=f"tensorrt {tensorrt.__version__}: {error}",
            expected="a Python package with tensorrt.plugin",
            change="use the plugin library: make plugin",
        ) from error
    module: ModuleType = tensorrt
    return module


@cache
def register(capability: int) -> tuple[str, ...]:
    """Register the three ops with TensorRT, once in a process; their names.

    Kernels are compiled when TensorRT asks for them while it builds. A compiler is looked for
    now, so that its absence is said before.

    Args:
        capability: of the GPU that the engine is built for; 87 is 8.7.

    Raises:
        InputError: TensorRT or the GPU is too old, or there is no nvcc.
        MissingPackageError: TensorRT is not installed.
    """
    library = _load_tensorrt()
    nvcc = _chosen_nvcc()
    _compile_ptx(_kernel_of(_AotProduct(PRODUCT, "fp16", 64, 64), 1), capability, nvcc)
    _register_ops(library, capability, nvcc)
    return MIX, MIX_INDEXED, PRODUCT


def _register_ops(library: Any, capability: int, nvcc: Path) -> None:
    """Define shapes, types and kernels of the three ops in `tensorrt.plugin`."""
    import tensorrt.plugin as trtp

    Kernel = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def embed(
        op: str, x: trtp.TensorDesc, w: trtp.TensorDesc, tactic: int
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        product = _product_of(op, library, x, w)
        kernel = _kernel_of(product, tactic)
        launch, arguments = _symbolic_launch(trtp, product, _launch_of(product, tactic), x)
        return kernel.name, _compile_ptx(kernel, capability, nvcc), launch, arguments

    def define(op: str) -> None:
        @trtp.register(f"{_NAMESPACE}::{op}")
        def shape(x: trtp.TensorDesc, w: trtp.TensorDesc) -> trtp.TensorDesc:
            return _result_of(trtp, x, w)

        @trtp.autotune(f"{_NAMESPACE}::{op}")
        def types(
            x: trtp.TensorDesc, w: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
        ) -> list[trtp.AutoTuneCombination]:
            return _combinations(trtp, "{0}, {0}, {0}")

        @trtp.aot_impl(f"{_NAMESPACE}::{op}")
        def kernel(
            x: trtp.TensorDesc, w: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
        ) -> Kernel:
            return embed(op, x, w, tactic)

    define(MIX)
    define(PRODUCT)

    @trtp.register(f"{_NAMESPACE}::{MIX_INDEXED}")
    def shape(x: trtp.TensorDesc, w: trtp.TensorDesc, index: trtp.TensorDesc) -> trtp.TensorDesc:
        return _result_of(trtp, x, w)

    @trtp.autotune(f"{_NAMESPACE}::{MIX_INDEXED}")
    def types(
        x: trtp.TensorDesc,
        w: trtp.TensorDesc,
        index: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return _combinations(trtp, "{0}, {0}, INT32, {0}")

    @trtp.aot_impl(f"{_NAMESPACE}::{MIX_INDEXED}")
    def kernel(
        x: trtp.TensorDesc,
        w: trtp.TensorDesc,
        index: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> Kernel:
        return embed(MIX_INDEXED, x, w, tactic)


def _result_of(trtp: Any, x: Any, w: Any) -> Any:
    """Descriptor of the result: x with the columns of w for its last dimension."""
    dims = [x.shape_expr[axis] for axis in range(x.ndim - 1)]
    return trtp.from_shape_expr((*dims, w.shape_expr[1]), dtype=x.dtype)


def _combinations(trtp: Any, types: str) -> list[Any]:
    """Types of inputs and output: all fp16 or all bf16, row-major, in every tactic."""
    return [
        trtp.AutoTuneCombination(types.format(name), "LINEAR", list(_TACTIC_ROWS))
        for name in ("FP16", "BF16")
    ]


def _product_of(op: str, library: Any, x: Any, w: Any) -> _AotProduct:
    """The product that TensorRT's descriptors of x and w describe.

    Raises:
        InputError: weights whose shape is not known when the engine is built, or another type.
    """
    names: dict[Any, _FloatType] = {library.float16: "fp16", library.bfloat16: "bf16"}
    reduction, columns = (int(size) for size in w.shape)
    if x.dtype not in names or min(reduction, columns) < 0:
        raise InputError(
            f"{op} cannot be embedded.",
            observed=f"x of {x.dtype}, weights [{reduction}, {columns}]",
            expected="fp16 or bf16, and weights of a fixed shape",
        )
    return _AotProduct(op, names[x.dtype], reduction, columns)


def _symbolic_launch(
    trtp: Any, product: _AotProduct, launch: _AotLaunch, x: Any
) -> tuple[Any, Any]:
    """TensorRT's form of a launch, and of the kernel's integers: rows, reduction, columns.

    Returns:
        KernelLaunchParams and SymIntExprs; rows are an expression of x's dimensions.
    """
    rows = trtp.ShapeExpr(1)
    for axis in range(x.ndim - 1):
        rows = rows * x.shape_expr[axis]
    row_blocks = trtp.cdiv(rows, launch.rows_of_block)
    params = trtp.KernelLaunchParams()
    params.grid_x = row_blocks if launch.rows_first else launch.column_blocks
    params.grid_y = launch.column_blocks if launch.rows_first else row_blocks
    params.block_x = launch.threads
    params.shared_mem = launch.shared_bytes
    numbers = (rows, product.reduction, product.columns)
    return params, trtp.SymIntExprs.from_tuple([trtp.SymInt32(number) for number in numbers])
