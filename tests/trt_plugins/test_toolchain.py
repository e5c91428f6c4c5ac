"""Headers and compilers are found where users have them, and what is wrong is said plainly."""

from __future__ import annotations

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
    with pytest.raises(InputError, match=r"8\.6\.1; IPluginV3 came with 10\.0"):
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


def test_libraries_from_wheels_get_the_names_that_linkers_look_for(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").write_bytes(b"library")
    toolchain._name_libraries(tmp_path)
    assert (tmp_path / "lib64" / "libcudart.so").read_bytes() == b"library"


def test_a_missing_host_compiler_is_named_with_its_package() -> None:
    with pytest.raises(InputError, match=r"apt-get install g\+\+"):
        toolchain.find_compiler({"PATH": "/nowhere"})
