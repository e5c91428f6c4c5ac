"""What is read from /proc."""

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
