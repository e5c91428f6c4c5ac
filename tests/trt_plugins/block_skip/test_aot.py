"""Kernels for the engine itself: chosen, compiled, launched, and right."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pipeline.errors import InputError, MissingPackageError
from tests.support.emulated import CHECKED, FAST, compile_program
from trt_plugins.block_skip import aot
from trt_plugins.block_skip.aot import (
    _TACTIC_ROWS,
    MIX,
    MIX_INDEXED,
    PRODUCT,
    _AotProduct,
    _compile_ptx,
    _kernel_of,
    _launch_of,
)
from trt_plugins.toolchain import local_nvcc

OPS = (MIX, MIX_INDEXED, PRODUCT)
# Rounding of the result alone is 2^-12 (fp16) and 2^-9 (bf16) of each number at most.
BOUNDS = {"fp16": 1e-3, "bf16": 1e-2}
# (rows, reduction, columns): aligned; odd; one slice after another; several blocks each way.
SHAPES = [(1, 128, 64), (3, 77, 131), (9, 2200, 8), (70, 64, 136), (130, 33, 72), (2, 8, 1)]


def nvcc() -> Path:
    """The compiler, or skip: the tests fetch nothing."""
    found = local_nvcc()
    if found is None or shutil.which("g++") is None:
        pytest.skip("nvcc or g++ is not installed")
    return found


def emulated_errors(program: Path, lines: list[str], seed: int) -> list[float]:
    """What `emulate/aot.cpp` answers to its cases."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    answer = subprocess.run(
        [str(program), str(seed)], input="\n".join(lines), capture_output=True, text=True,
        check=False, env=environment,
    )  # fmt: skip
    assert answer.returncode == 0, f"seed {seed}\n{answer.stderr}"
    return [float(line) for line in answer.stdout.split()]


def cases() -> list[tuple[_AotProduct, int, int]]:
    """Every op and type by every tactic on every shape, with its rows."""
    return [
        (_AotProduct(op, dtype, reduction, columns), tactic, rows)
        for op in OPS
        for dtype in ("fp16", "bf16")
        for tactic in _TACTIC_ROWS
        for rows, reduction, columns in SHAPES
    ]


def line_of(product: _AotProduct, tactic: int, rows: int) -> str:
    """A case as `emulate/aot.cpp` reads it: the kernel as chosen, launched as computed."""
    kernel, launch = dict(_kernel_of(product, tactic).definitions), _launch_of(product, tactic)
    flags = {"true": 1, "false": 0}
    fields = [
        "mix" if kernel["MIX"] == "true" else "product",
        product.dtype,
        kernel["INDEXED"],
        flags[kernel["VECTOR"]],
        kernel["TILE_ROWS"],
        flags[kernel["GATHER"]],
        rows,
        product.reduction,
        product.columns,
        *launch.grid(rows),
        launch.threads,
        launch.shared_bytes,
    ]
    return " ".join(map(str, fields))


def require_within_bounds(program: Path) -> None:
    seed = int.from_bytes(os.urandom(2), "little")
    chosen = cases()
    errors = emulated_errors(program, [line_of(*case) for case in chosen], seed)
    beyond = [
        (case, error)
        for case, error in zip(chosen, errors, strict=True)
        if not error <= BOUNDS[case[0].dtype]
    ]
    assert beyond == [], f"seed {seed}"


@pytest.mark.slow
def test_every_kernel_as_launched_agrees_with_double_precision(tmp_path: Path) -> None:
    require_within_bounds(compile_program(tmp_path, ("emulate/aot.cpp",), FAST))


@pytest.mark.slow
def test_no_embedded_kernel_reads_or_writes_beside_its_memory(tmp_path: Path) -> None:
    require_within_bounds(compile_program(tmp_path, ("emulate/aot.cpp",), CHECKED))


@pytest.mark.parametrize("capability", [87, 90])
@pytest.mark.parametrize("op", OPS)
def test_the_ptx_holds_one_entry_of_the_name_with_tensorrts_arguments(
    op: str, capability: int
) -> None:
    kernel = _kernel_of(_AotProduct(op, "bf16", 1000, 1504), 1 + OPS.index(op))
    ptx = _compile_ptx(kernel, capability, nvcc())
    assert re.findall(r"\.visible \.entry (\w+)\(", ptx) == [kernel.name]
    assert f".target sm_{capability}" in ptx
    # Inputs, three integers, the output.
    inputs = 3 if op == MIX_INDEXED else 2
    types = re.findall(r"\.param \.(\w+)", ptx[ptx.index(".entry") : ptx.index("{")])
    assert types == ["u64"] * inputs + ["u32"] * 3 + ["u64"]


def test_no_embedded_kernel_spills_registers(tmp_path: Path) -> None:
    # The tightest: gathered tiles of 64 rows, and the decode step without vector loads.
    for columns, tactic in ((1504, 3), (1503, 1)):
        kernel = _kernel_of(_AotProduct(MIX_INDEXED, "bf16", 1000, columns), tactic)
        ptx = tmp_path / "kernel.ptx"
        ptx.write_text(_compile_ptx(kernel, 87, nvcc()))
        ptxas = nvcc().resolve().with_name("ptxas")
        command = [str(ptxas), "-v", "-arch=sm_87", str(ptx), "-o", str(tmp_path / "kernel.cubin")]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "0 bytes spill stores, 0 bytes spill loads" in answer.stdout + answer.stderr


def test_kernels_differ_by_name_whenever_they_differ() -> None:
    # TensorRT keeps them by name.
    kernels = {_kernel_of(product, tactic) for product, tactic, _ in cases()}
    assert len({kernel.name for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (8, 1), (9, 2), (2048, 256)])
def test_decode_takes_eight_rows_and_sixty_four_columns_to_a_block(rows: int, blocks: int) -> None:
    launch = _launch_of(_AotProduct(MIX, "fp16", 2592, 1504), 1)
    assert launch.grid(rows) == (24, blocks)


@pytest.mark.parametrize("tactic", _TACTIC_ROWS)
def test_blocks_cover_every_row_and_column_and_ask_for_no_extra_memory(tactic: int) -> None:
    product = _AotProduct(PRODUCT, "fp16", 100, 1001)
    launch = _launch_of(product, tactic)
    width = 64 if tactic == 1 else 128
    assert (launch.column_blocks - 1) * width < 1001 <= launch.column_blocks * width
    row_blocks = launch.grid(301)[0 if launch.rows_first else 1]
    assert (row_blocks - 1) * launch.rows_of_block < 301 <= row_blocks * launch.rows_of_block
    assert launch.shared_bytes <= 48 * 1024


@pytest.mark.parametrize(
    ("op", "reduction", "columns", "gathers"),
    [
        (MIX, 64, 64, False),
        (MIX_INDEXED, 64, 64, True),
        (MIX, 63, 64, True),
        (MIX, 64, 63, True),
        (PRODUCT, 64, 63, False),
        (PRODUCT, 63, 64, True),
    ],
)
def test_inputs_are_gathered_only_where_copies_would_be_misaligned(
    op: str, reduction: int, columns: int, gathers: bool
) -> None:
    kernel = _kernel_of(_AotProduct(op, "fp16", reduction, columns), 3)
    assert dict(kernel.definitions)["GATHER"] == str(gathers).lower()


def test_a_gpu_before_ampere_is_refused() -> None:
    with pytest.raises(InputError, match=r"7\.5"):
        _compile_ptx(_kernel_of(_AotProduct(PRODUCT, "fp16", 64, 64), 1), 75, Path("nvcc"))


def test_what_nvcc_says_reaches_the_user() -> None:
    kernel = aot._AotKernel("nothing", (("NAME", "nothing"),))
    with pytest.raises(InputError, match="nvcc cannot compile nothing") as refused:
        _compile_ptx(kernel, 87, nvcc())
    assert "SKIPCAT_AOT_TYPE" in str(refused.value)


@pytest.mark.parametrize("version", ["10.3.0", "10.8.0.43", "8.6.2"])
def test_a_tensorrt_without_embedding_is_refused(version: str) -> None:
    library = ModuleType("tensorrt")
    library.__dict__.update(__version__=version, QuickPluginCreationRequest=None)
    with pytest.raises(InputError, match=re.escape(version)):
        aot._require_embedding(library)


def test_tensorrt_for_rtx_is_refused() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    with pytest.raises(InputError, match=r"tensorrt 10\.9 or newer"):
        aot._require_embedding(rtx)


def test_a_missing_tensorrt_is_said() -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(MissingPackageError, match="tensorrt"):
        aot.register(87)


def test_weights_of_an_unknown_shape_are_refused() -> None:
    library = SimpleNamespace(float16="half", bfloat16="bf16")
    x = SimpleNamespace(dtype="half")
    with pytest.raises(InputError, match="fixed shape"):
        aot._product_of(MIX, library, x, SimpleNamespace(shape=(-1, 64)))
    wide = SimpleNamespace(dtype="float")
    with pytest.raises(InputError, match="float"):
        aot._product_of(MIX, library, wide, SimpleNamespace(shape=(64, 64)))
