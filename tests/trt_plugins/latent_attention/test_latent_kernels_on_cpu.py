"""The CUDA kernels of latent attention, compiled for the CPU and run there thread by thread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.emulated import CHECKED, FAST, LATENT_KERNELS, compare, compile_program

SOURCES = ("latent_attention_kernel.cu", "emulate/compare.cpp")


def test_every_form_of_cache_agrees_with_double_precision(tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(2), "little")
    result = compare(compile_program(tmp_path, SOURCES, FAST, kernels=LATENT_KERNELS), 8, seed)
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}{result.stderr}"
    assert "8 cases, 0 beyond" in result.stdout


@pytest.mark.slow
def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    # The comparison would be worth little if a broken kernel passed it.
    broken = ("-DSKIPCAT_EMULATE_NO_BARRIER",)
    program = compile_program(tmp_path, SOURCES, FAST, broken, kernels=LATENT_KERNELS)
    assert compare(program, 10, 1).returncode != 0


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beside_its_memory(tmp_path: Path) -> None:
    program = compile_program(tmp_path, SOURCES, CHECKED, kernels=LATENT_KERNELS)
    result = compare(program, 60, 3)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ERROR" not in result.stderr
