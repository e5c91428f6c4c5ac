"""What is read from nvidia-smi, the device tree, and JetPack's release file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import gpu
from pipeline.gpu import Gpu, read_jetpack

H200 = Gpu("NVIDIA H200", (9, 0), 143771, "580.1")


def test_gpus_are_parsed_with_and_without_memory_of_their_own() -> None:
    text = "NVIDIA H200, 9.0, 143771, 580.1\nOrin (nvgpu), 8.7, [N/A], 540.4.0\n"
    assert [found.memory_mib for found in gpu._parse_gpus(text)] == [143771, None]
    assert [found.dotted_capability for found in gpu._parse_gpus(text)] == ["9.0", "8.7"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n", "JetPack 6.1 or 6.2"),
        ("# R36 (release), REVISION: 5.0\n", "JetPack 6.2.2, TensorRT 10.3"),
        ("# R39 (release), REVISION: 2.0\n", "JetPack 7.2"),
        ("# R99 (release), REVISION: 1.0\n", "not known"),
        ("rubbish\n", "unknown release: rubbish"),
        ("", "empty file"),
    ],
)
def test_jetpack_is_read_from_the_l4t_release(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "nv_tegra_release"
    path.write_text(text)
    assert expected in str(read_jetpack(path))


def test_no_release_file_is_no_jetson(tmp_path: Path) -> None:
    assert read_jetpack(tmp_path / "absent") is None


def test_the_first_gpu_with_a_capability_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    lines = (
        "Orin (nvgpu), [N/A], [N/A], 540.4.0\nNVIDIA H200, 9.0, 143771, 580.1\nNVIDIA L4, 8.9, 1, 2"
    )
    program.write_text(f"#!/bin/sh\necho '{lines}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu, "_find_jetson", lambda: None)
    assert gpu.find_gpu() == H200
    program.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert gpu.find_gpus() == ((), "nvidia-smi lists none")
    assert gpu.find_gpu() is None


def test_a_jetson_is_recognised_by_its_device_tree(tmp_path: Path) -> None:
    model, absent = tmp_path / "model", tmp_path / "absent"
    model.write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\x00")
    found = gpu._find_jetson(model, absent)
    assert found == Gpu("NVIDIA Jetson AGX Orin Developer Kit", (8, 7))
    assert gpu._parse_gpus("Orin (nvgpu), [N/A], [N/A], 540.4.0", found)[0].capability == (8, 7)
    model.write_bytes(b"Raspberry Pi 5\x00")
    assert gpu._find_jetson(model, absent) is None
    assert gpu._find_jetson(absent, absent) is None


@pytest.mark.parametrize(
    ("name", "chip", "capability"),
    [
        ("Seeed reComputer J4012", "tegra234", (8, 7)), ("ADLINK RQX-59", "tegra234", (8, 7)),
        ("a board", "tegra264", (11, 0)), ("Jetson Orin of old", "tegra194", None),
        ("", "tegra234", (8, 7)),
    ],
)  # fmt: skip
def test_a_board_of_another_name_is_known_by_its_chip(
    name: str, chip: str, capability: tuple[int, int] | None, tmp_path: Path
) -> None:
    model, compatible = tmp_path / "model", tmp_path / "compatible"
    if name:
        model.write_text(f"{name}\x00")
    words = ("nvidia,p3768-0000+p3767-0003", "nvidia,p3767-0003", f"nvidia,{chip}")
    compatible.write_text("".join(f"{word}\x00" for word in words))
    found = gpu._find_jetson(model, compatible)
    assert (found and found.capability) == capability


@pytest.mark.parametrize("module", ["pipeline.gpu", "trt_plugins.toolchain"])
def test_what_the_tools_import_needs_nothing_but_the_standard_library(module: str) -> None:
    root = Path(gpu.__file__).parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {module}"
    command = [sys.executable, "-I", "-S", "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
