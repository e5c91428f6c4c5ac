"""What is read from nvidia-smi, from /proc and from JetPack's release file."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import machine


def test_gpus_are_parsed_with_and_without_memory_of_their_own() -> None:
    text = "NVIDIA H200, 9.0, 143771, 580.1\nOrin (nvgpu), 8.7, [N/A], 540.4.0\n"
    assert [gpu.memory_mib for gpu in machine.parse_gpus(text)] == [143771, None]
    assert [gpu.capability for gpu in machine.parse_gpus(text)] == ["9.0", "8.7"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n", "JetPack 6.1 or 6.2"),
        ("# R39 (release), REVISION: 2.0\n", "JetPack 7.2"),
        ("# R99 (release), REVISION: 1.0\n", "not known"),
        ("rubbish\n", "unknown release: rubbish"),
        ("", "empty file"),
    ],
)
def test_jetpack_is_read_from_the_l4t_release(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "nv_tegra_release"
    path.write_text(text)
    assert expected in str(machine.read_jetpack(path))


def test_absent_files_mean_unknown_not_failure(tmp_path: Path) -> None:
    assert machine.read_jetpack(tmp_path / "absent") is None
    assert machine.cpu_flags(tmp_path / "absent") == ()


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx2 zz", "Features\t: fp asimd"])
def test_cpu_flags_of_both_architectures(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor : 0\n{line}\n")
    assert machine.cpu_flags(path) in {("avx2",), ("asimd",)}
