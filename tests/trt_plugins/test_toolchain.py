"""Headers and compilers are found where users have them, and what is wrong is said plainly."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.errors import InputError
from trt_plugins import toolchain


def write_headers(folder: Path, version: tuple[int, int, int], enterprise: bool) -> Path:
    """NvInferVersion.h in the old spelling, or in the one that names a number by another name."""
    folder.mkdir(parents=True)
    names = ("MAJOR", "MINOR", "PATCH")
    lines = []
    for name, number in zip(names, version, strict=True):
        if enterprise:
            lines.append(f"#define TRT_{name}_ENTERPRISE {number}")
            lines.append(f"#define NV_TENSORRT_{name} TRT_{name}_ENTERPRISE //!< TensorRT.")
        else:
            lines.append(f"#define NV_TENSORRT_{name} {number} //!< TensorRT.")
    (folder / "NvInferVersion.h").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("enterprise", [False, True])
def test_the_version_is_read_from_either_spelling(tmp_path: Path, enterprise: bool) -> None:
    folder = write_headers(tmp_path / "include", (10, 3, 0), enterprise)
    assert toolchain._header_version(folder) == (10, 3, 0)


def test_the_root_that_was_set_comes_before_all_else(tmp_path: Path) -> None:
    folder = write_headers(tmp_path / "trt" / "include", (10, 16, 1), True)
    found = toolchain.find_headers(tmp_path, {"TENSORRT_ROOT": str(tmp_path / "trt")})
    assert (found.path, found.version) == (folder, "10.16.1")


def test_a_root_without_headers_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no NvInferVersion"):
        toolchain.find_headers(tmp_path, {"TENSORRT_ROOT": str(tmp_path)})


def test_headers_without_version_3_plugins_are_refused(tmp_path: Path) -> None:
    write_headers(tmp_path / "include", (8, 6, 1), False)
    with pytest.raises(InputError, match=r"8\.6\.1; outputs of .* came with 10\.3"):
        toolchain.find_headers(tmp_path, {"TENSORRT_ROOT": str(tmp_path)})


def test_jetpack_headers_are_among_the_systems(tmp_path: Path) -> None:
    places = toolchain._header_candidates({}, tmp_path)
    assert any(path.name.endswith("-linux-gnu") for path in places)


def test_an_old_compiler_is_refused(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.4, V11.4.315'\n")
    nvcc.chmod(0o755)
    with pytest.raises(InputError, match=r"11\.4; the kernels need 12\.0"):
        toolchain.find_nvcc(tmp_path, {"CUDA_HOME": str(tmp_path)})


def write_nvcc(folder: Path, release: str) -> dict[str, str]:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}'\n")
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


@pytest.mark.parametrize(
    ("release", "driver", "is_taken"),
    [
        ("13.0", (12, 6), False), ("12.8", (12, 6), True), ("12.6", (13, 2), True),
        ("13.0", None, True),
    ],
)  # fmt: skip
def test_a_compiler_of_a_newer_major_version_than_the_driver_is_refused(
    release: str, driver: tuple[int, int] | None, is_taken: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(toolchain, "_driver_cuda", lambda: driver)
    environment = write_nvcc(tmp_path, release)
    if is_taken:
        assert toolchain.find_nvcc(tmp_path, environment).version == release
        return
    with pytest.raises(InputError, match=r"cuda-nvcc-12-6") as refused:
        toolchain.find_nvcc(tmp_path, environment)
    assert "driver of CUDA 12.6" in str(refused.value)


def test_pypis_compiler_is_not_even_fetched_for_an_older_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(toolchain, "_driver_cuda", lambda: (12, 6))
    monkeypatch.setattr(toolchain, "local_nvcc", lambda environment: None)
    monkeypatch.setattr(toolchain, "_install", fetch)
    with pytest.raises(InputError, match="newer than the driver"):
        toolchain.find_nvcc(tmp_path, {})


def test_the_driver_says_its_version_and_no_driver_says_none(tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for a driver")
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuDriverGetVersion(int *number) { *number = 12060; return 0; }")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    assert toolchain._driver_cuda(str(library)) == (12, 6)
    assert toolchain._driver_cuda(str(tmp_path / "none.so")) is None


def test_libraries_from_wheels_get_the_names_that_linkers_look_for(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").write_bytes(b"library")
    toolchain._name_libraries(tmp_path)
    assert (tmp_path / "lib64" / "libcudart.so").read_bytes() == b"library"


def test_a_missing_host_compiler_is_named_with_its_package() -> None:
    with pytest.raises(InputError, match=r"apt-get install g\+\+"):
        toolchain.find_compiler({"PATH": "/nowhere"})
