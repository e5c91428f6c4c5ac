"""The CUDA kernel that writes the cache, compiled for the CPU and run there thread by thread."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.emulated import CHECKED, KERNELS, compare, compile_program

SOURCES = ("cache_write_kernel.cu", "emulate/compare.cpp")


def test_new_rows_go_to_their_slots_and_nothing_else_is_read_or_written(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(2), "little")
    program = compile_program(tmp_path, SOURCES, CHECKED, kernels=KERNELS.with_name("cache_write"))
    result = compare(program, 60, seed)
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}{result.stderr}"
    assert "60 cases, 0 wrong" in result.stdout
    assert "ERROR" not in result.stderr
