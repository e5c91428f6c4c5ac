"""Headers and compilers are found where users have them, and what is wrong is said plainly."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def load(name: str) -> ModuleType:
    """One file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


find_toolchain = load("find_toolchain")
build_plugin = load("build_plugin")
BuildError = find_toolchain.BuildError


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
    assert find_toolchain.header_version(folder) == (10, 3, 0)


def test_the_root_that_was_set_comes_before_all_else(tmp_path: Path) -> None:
    folder = write_headers(tmp_path / "trt" / "include", (10, 16, 1), True)
    found = find_toolchain.find_headers(tmp_path, {"TENSORRT_ROOT": str(tmp_path / "trt")})
    assert (found.path, found.version) == (folder, "10.16.1")


def test_a_root_without_headers_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="has no NvInferVersion"):
        find_toolchain.find_headers(tmp_path, {"TENSORRT_ROOT": str(tmp_path)})


def test_headers_without_version_3_plugins_are_refused(tmp_path: Path) -> None:
    write_headers(tmp_path / "include", (8, 6, 1), False)
    with pytest.raises(BuildError, match=r"8\.6\.1; IPluginV3 came with 10\.0"):
        find_toolchain.find_headers(tmp_path, {"TENSORRT_ROOT": str(tmp_path)})


def test_jetpack_headers_are_among_the_systems(tmp_path: Path) -> None:
    places = find_toolchain.header_candidates({}, tmp_path)
    assert any(path.name.endswith("-linux-gnu") for path in places)


def test_an_old_compiler_is_refused(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.4, V11.4.315'\n")
    nvcc.chmod(0o755)
    with pytest.raises(BuildError, match=r"11\.4; the kernels need 12\.0"):
        find_toolchain.find_nvcc(tmp_path, {"CUDA_HOME": str(tmp_path)})


def test_libraries_from_wheels_get_the_names_that_linkers_look_for(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").write_bytes(b"library")
    find_toolchain.name_libraries(tmp_path)
    assert (tmp_path / "lib64" / "libcudart.so").read_bytes() == b"library"


def test_a_missing_host_compiler_is_named_with_its_package() -> None:
    with pytest.raises(BuildError, match=r"apt-get install g\+\+"):
        find_toolchain.find_compiler({"PATH": "/nowhere"})


def test_chosen_architectures_are_taken_as_they_are() -> None:
    assert build_plugin.architectures("86-real") == "86-real"
    assert build_plugin.architectures(None).endswith("87-real;90")


def test_the_resource_report_names_kernels_in_words() -> None:
    symbol = "_ZN7skipcat13decodeProductI6__halfLNS_10WeightTypeE4ELb1EEEvNS_15DecodeArgumentsIT_EE"
    log = (
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_87'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 126 registers, used 1 barriers, 448 bytes cmem[0]\n"
    )
    (row,) = build_plugin.read_resources(log)
    assert row["kernel"] == "decode"
    assert (row["x"], row["weights"], row["variant"]) == ("fp16", "int4", "16-byte loads")
    assert (row["gpu"], row["registers"], row["spill_bytes"]) == ("sm_87", 126, 16)


def test_a_failing_build_leaves_the_old_library(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / build_plugin.LIBRARY
    library.write_bytes(b"old")
    with pytest.raises(OSError, match=build_plugin.LIBRARY):
        build_plugin.deliver(tmp_path / "no-tree", tmp_path / "lib")
    assert library.read_bytes() == b"old"
