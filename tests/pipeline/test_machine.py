"""What is read from /proc and of the compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import machine


def test_an_absent_file_means_unknown_not_failure(tmp_path: Path) -> None:
    assert machine.cpu_flags(tmp_path / "absent") == ()


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx2 zz", "Features\t: fp asimd"])
def test_cpu_flags_of_both_architectures(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\n{line}\n")
    assert machine.cpu_flags(path) in {("avx2",), ("asimd",)}


def test_a_compiler_that_does_not_answer_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for text, expected in (("release 12.6, V12.6.85", f"12.6 ({nvcc})"), ("rubbish", None)):
        nvcc.write_text(f"#!/bin/sh\necho '{text}'\n")
        nvcc.chmod(0o755)
        assert machine._find_nvcc() == expected
