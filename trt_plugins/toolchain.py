"""What compiling the kernels takes, and where it was found: nvcc, headers, cmake, ninja, g++.

Each is looked for on this machine first, and taken from PyPI where it is missing. Standard library
only: `make plugin` runs before the environment is complete.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError

# Where `make plugin` builds, and where what comes from PyPI is kept.
WORK = Path(__file__).parents[1] / "build" / "plugin"
# Of the GPUs that the kernels run on; 80 is 8.0.
OLDEST_CAPABILITY = 80
# A wheel that carries TensorRT's public headers; only those are taken out of it.
_HEADERS_WHEEL = "kernel-lens==2.0.1"
_HEADERS_IN_WHEEL = "kernel_lens/include/tensorrt/"
_OLDEST_TENSORRT = (10, 3)
_CUDA_OF_WHEELS = "13.0"
_CUDA_WHEELS = tuple(
    f"nvidia-{name}=={_CUDA_OF_WHEELS}.*"
    for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
)
_CUDA_IN_WHEELS = "nvidia/cu13"
_OLDEST_NVCC = (12, 0)
_COMPILING_S_AT_MOST = 600


@dataclass(frozen=True)
class Found:
    """A tool or folder, its version, and how it came to be here."""

    path: Path
    version: str
    origin: str


def require_capability(capability: int) -> None:
    """Raise InputError for a GPU too old for the block-skip kernels; 87 is 8.7."""
    if capability < OLDEST_CAPABILITY:
        raise InputError(
            "The block-skip kernels need the matrix units of Ampere or newer.",
            observed=f"compute capability {capability / 10:.1f}",
            expected="8.0 or newer",
        )


def run_nvcc(nvcc: Path, arguments: Sequence[str], what: str) -> None:
    """Compile something.

    Raises:
        InputError: nvcc fails, with the end of what it printed.
    """
    command = [str(nvcc), "-std=c++17", "-O3", *arguments]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_COMPILING_S_AT_MOST
    )
    if answer.returncode != 0:
        raise InputError(
            f"nvcc cannot compile {what}.",
            where=nvcc,
            observed="\n".join((answer.stderr or answer.stdout).strip().splitlines()[-8:]),
            change="needs CUDA 12 or newer and a host compiler that it supports",
        )


def run_program(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    """Output of a program.

    Raises:
        InputError: it cannot be run or fails, with the end of what it printed.
    """
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
    except OSError as error:
        raise InputError(f"{what}: {error}") from error
    if answer.returncode != 0:
        lines = (answer.stdout + answer.stderr).strip().splitlines()
        raise InputError(f"{what} failed:\n  " + "\n  ".join(lines[-15:]))
    return answer.stdout


def _header_candidates(environment: dict[str, str], system: Path = Path("/")) -> list[Path]:
    """Folders in which TensorRT's headers may lie, the chosen one before the system's."""
    root = environment.get("TENSORRT_ROOT")
    if root:
        return [Path(root) / "include", Path(root)]
    machine = platform.machine()
    places = (f"usr/include/{machine}-linux-gnu", "usr/include", "usr/local/tensorrt/include")
    return [system / place for place in places]


def _header_version(folder: Path) -> tuple[int, ...] | None:
    """Version that NvInferVersion.h of a folder states; None when there are no headers."""
    try:
        text = (folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    values = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", text))

    def resolved(name: str) -> str:
        value = values.get(name, "")
        return resolved(value) if value in values else value

    numbers = [resolved(f"NV_TENSORRT_{part}") for part in ("MAJOR", "MINOR", "PATCH")]
    return tuple(map(int, numbers)) if all(number.isdigit() for number in numbers) else None


def find_headers(work: Path, environment: dict[str, str]) -> Found:
    """TensorRT's headers: those of TENSORRT_ROOT, the system's (JetPack), or PyPI's.

    Raises:
        InputError: TENSORRT_ROOT has none, they are too old, or PyPI is out of reach.
    """
    for folder in _header_candidates(environment):
        version = _header_version(folder)
        if version is not None:
            if version < _OLDEST_TENSORRT:
                raise InputError(
                    f"{folder} is TensorRT {_dotted(version)}; outputs of plugins that are aliases "
                    "came with 10.3.\n  Set TENSORRT_ROOT to a newer one."
                )
            return Found(folder, _dotted(version), "this machine")
    if environment.get("TENSORRT_ROOT"):
        raise InputError(
            f"TENSORRT_ROOT={environment['TENSORRT_ROOT']} has no NvInferVersion.h.\n"
            "  Unset it to use the system's headers, or PyPI's."
        )
    folder = work / "tensorrt-headers"
    if _header_version(folder) is None:
        _download_headers(folder)
    version = _header_version(folder)
    if version is None:
        raise InputError(f"{_HEADERS_WHEEL} from PyPI has no TensorRT headers any more.")
    return Found(folder, _dotted(version), f"PyPI, {_HEADERS_WHEEL}")


def _download_headers(folder: Path) -> None:
    """Take the headers out of the wheel, into a folder that appears whole."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    pip(["download", "--no-deps", "--dest", str(aside), _HEADERS_WHEEL], "downloading the headers")
    wheel = next(aside.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_HEADERS_IN_WHEEL) and name.endswith(".h"):
                (aside / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()
    aside.rename(folder)


def local_nvcc(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The CUDA compiler of this machine: of CUDA_HOME, on PATH, or where JetPack leaves it."""
    home = environment.get("CUDA_HOME")
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(on_path)] if on_path else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in places if path.is_file()), None)


def find_nvcc(work: Path, environment: Mapping[str, str]) -> Found:
    """nvcc: of this machine, or from PyPI.

    Raises:
        InputError: it is too old, newer than the driver, or not here and PyPI is out of reach.
    """
    path, origin = local_nvcc(environment), "this machine"
    if path is None:
        _require_driver(_CUDA_OF_WHEELS, "PyPI's nvcc")
        target = work / "cuda"
        path, origin = target / _CUDA_IN_WHEELS / "bin" / "nvcc", "PyPI, " + _CUDA_WHEELS[0]
        if not path.is_file():
            _install(target, _CUDA_WHEELS, "installing nvcc")
            _name_libraries(target / _CUDA_IN_WHEELS)
    release = nvcc_release(path)
    if tuple(map(int, release.split("."))) < _OLDEST_NVCC:
        raise InputError(f"{path} is CUDA {release}; the kernels need 12.0 or newer.")
    _require_driver(release, str(path))
    return Found(path, release, origin)


def _require_driver(release: str, where: str) -> None:
    """Refuse a compiler whose kernels this machine's driver does not load; none is anyone's.

    A driver loads what any release of its own major version made.

    Raises:
        InputError: the driver is of an older one.
    """
    driver = _driver_cuda()
    if driver is not None and int(release.split(".")[0]) > driver[0]:
        raise InputError(
            "This CUDA compiler is newer than the driver, which could not load what it makes.",
            where=where,
            observed=f"nvcc of CUDA {release}, a driver of CUDA {_dotted(driver)}",
            expected=f"nvcc of CUDA {driver[0]}",
            change=f"sudo apt-get install cuda-nvcc-{driver[0]}-{driver[1]}, or set CUDA_HOME to "
            "a toolkit of that version",
        )


def _driver_cuda(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """CUDA version of this machine's driver; None where there is none."""
    try:
        ask = ctypes.CDLL(library).cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int()
    if ask(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def nvcc_text(nvcc: Path) -> str:
    """What a CUDA compiler says of its version; the last line names the build."""
    return run_program([str(nvcc), "--version"], str(nvcc)).strip()


def nvcc_release(nvcc: Path) -> str:
    """Such as '12.6'; raise InputError when it says none."""
    match = re.search(r"release (\d+\.\d+)", nvcc_text(nvcc))
    if match is None:
        raise InputError(f"{nvcc} --version says nothing of a release.")
    return match.group(1)


def _name_libraries(toolkit: Path) -> None:
    """Give the libraries of the wheels the names and places that NVIDIA's installer gives them."""
    (toolkit / "lib64").symlink_to("lib")
    for library in (toolkit / "lib").glob("lib*.so.*"):
        plain = library.with_name(library.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)


def find_program(name: str, work: Path, environment: dict[str, str]) -> Found:
    """The program of that name, cmake or ninja: on PATH, or from PyPI."""
    found = shutil.which(name, path=environment.get("PATH"))
    if found:
        return Found(
            Path(found), _first_number(run_program([found, "--version"], name)), "this machine"
        )
    target = _program_folder(work, name)
    path = target / "bin" / name
    if not path.is_file():
        _install(target, (name,), f"installing {name}")
    version = _first_number(
        run_program([str(path), "--version"], name, with_modules(work, environment))
    )
    return Found(path, version, f"PyPI, {name}")


def _program_folder(work: Path, name: str) -> Path:
    """Where pip puts one program and its modules."""
    return work / "programs" / name


def with_modules(work: Path, environment: dict[str, str]) -> dict[str, str]:
    """An environment in which programs that pip brought find their modules."""
    folders = [str(_program_folder(work, name)) for name in ("cmake", "ninja")]
    return environment | {"PYTHONPATH": os.pathsep.join(folders)}


def find_compiler(environment: dict[str, str]) -> Found:
    """The host compiler; raise InputError when there is none: PyPI has no usual one."""
    name = environment.get("CXX", "g++")
    found = shutil.which(name, path=environment.get("PATH"))
    if found is None:
        raise InputError(
            f"There is no C++ compiler: {name} is not on PATH.\n"
            "  Install one: apt-get install g++ (or set CXX)."
        )
    return Found(
        Path(found), _first_number(run_program([found, "--version"], name)), "this machine"
    )


def _install(target: Path, packages: tuple[str, ...], what: str) -> None:
    """Install packages from PyPI into a folder that appears whole."""
    aside = target.with_name(target.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    pip(["install", "--no-deps", "--target", str(aside), *packages], what)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def pip(arguments: list[str], what: str) -> None:
    """Run this Python's pip quietly."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    run_program(command, what, dict(os.environ))


def _first_number(text: str) -> str:
    """The first version in a text."""
    match = re.search(r"\d+(\.\d+)+", text)
    return match.group(0) if match else "?"


def _dotted(version: tuple[int, ...]) -> str:
    """(10, 3) -> '10.3'."""
    return ".".join(map(str, version))
