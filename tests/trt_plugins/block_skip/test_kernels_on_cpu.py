"""The CUDA kernels themselves, compiled for the CPU and run there thread by thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.emulated import CHECKED, FAST, compare, compile_program

SOURCES = ("block_skip_kernel.cu", "emulate/compare.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_program(tmp_path_factory.mktemp("emulated"), SOURCES, FAST)


def test_every_shape_type_and_width_agrees_with_double_precision(program: Path) -> None:
    seed = int.from_bytes(os.urandom(2), "little")
    result = compare(program, 40, seed)
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}{result.stderr}"
    assert "40 cases, 0 beyond" in result.stdout


@pytest.mark.slow
def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    # The comparison would be worth little if a broken kernel passed it.
    broken = compile_program(tmp_path, SOURCES, FAST, ("-DSKIPCAT_EMULATE_NO_BARRIER",))
    assert compare(broken, 20, 1).returncode != 0


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beside_its_memory(tmp_path: Path) -> None:
    result = compare(compile_program(tmp_path, SOURCES, CHECKED), 150, 3)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ERROR" not in result.stderr
    lines = result.stdout.splitlines()
    for seen in ("fp16", "bf16", "bits 16", "bits  8", "bits  4", "indexed", "ordered"):
        assert any(seen in line for line in lines), seen
    for tactic in range(4):
        assert any(f"tactic {tactic}:" in line for line in lines)
