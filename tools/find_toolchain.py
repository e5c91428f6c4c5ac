"""What compiling the plugin takes, and where it was found: headers, nvcc, cmake, ninja, a compiler.

Each is looked for on this machine first, and taken from PyPI where it is missing. Standard library
only: it may run before the environment is complete.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

# A wheel that carries TensorRT's public headers; only those are taken out of it.
HEADERS_WHEEL = "kernel-lens==2.0.1"
HEADERS_IN_WHEEL = "kernel_lens/include/tensorrt/"
OLDEST_TENSORRT = (10, 0)
CUDA_WHEELS = tuple(
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
)
CUDA_IN_WHEELS = "nvidia/cu13"
OLDEST_NVCC = (12, 0)


class BuildError(Exception):
    """What is wrong, and what to change, in words for the user."""


@dataclass(frozen=True)
class Found:
    """A tool or folder, its version, and how it came to be here."""

    path: Path
    version: str
    origin: str


def run(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    """Output of a program; raise BuildError with the end of it when the program fails."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment
        )
    except OSError as error:
        raise BuildError(f"{what}: {error}") from error
    if answer.returncode != 0:
        lines = (answer.stdout + answer.stderr).strip().splitlines()
        raise BuildError(f"{what} failed:\n  " + "\n  ".join(lines[-15:]))
    return answer.stdout


def header_candidates(environment: dict[str, str], system: Path = Path("/")) -> list[Path]:
    """Folders in which TensorRT's headers may lie, the chosen one before the system's."""
    root = environment.get("TENSORRT_ROOT")
    if root:
        return [Path(root) / "include", Path(root)]
    machine = platform.machine()
    places = (f"usr/include/{machine}-linux-gnu", "usr/include", "usr/local/tensorrt/include")
    return [system / place for place in places]


def header_version(folder: Path) -> tuple[int, ...] | None:
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
        BuildError: TENSORRT_ROOT has none, they are too old, or PyPI is out of reach.
    """
    for folder in header_candidates(environment):
        version = header_version(folder)
        if version is not None:
            if version < OLDEST_TENSORRT:
                raise BuildError(
                    f"{folder} is TensorRT {dotted(version)}; IPluginV3 came with 10.0.\n"
                    "  Set TENSORRT_ROOT to a newer one."
                )
            return Found(folder, dotted(version), "this machine")
    if environment.get("TENSORRT_ROOT"):
        raise BuildError(
            f"TENSORRT_ROOT={environment['TENSORRT_ROOT']} has no NvInferVersion.h.\n"
            "  Unset it to use the system's headers, or PyPI's."
        )
    folder = work / "tensorrt-headers"
    if header_version(folder) is None:
        download_headers(folder)
    version = header_version(folder)
    if version is None:
        raise BuildError(f"{HEADERS_WHEEL} from PyPI has no TensorRT headers any more.")
    return Found(folder, dotted(version), f"PyPI, {HEADERS_WHEEL}")


def download_headers(folder: Path) -> None:
    """Take the headers out of the wheel, into a folder that appears whole."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    pip(["download", "--no-deps", "--dest", str(aside), HEADERS_WHEEL], "downloading the headers")
    wheel = next(aside.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(HEADERS_IN_WHEEL) and name.endswith(".h"):
                (aside / Path(name).name).write_bytes(archive.read(name))
    wheel.unlink()
    aside.rename(folder)


def find_nvcc(work: Path, environment: dict[str, str]) -> Found:
    """nvcc: of CUDA_HOME, on PATH, in /usr/local/cuda, or from PyPI.

    Raises:
        BuildError: it is too old, or not here and PyPI is out of reach.
    """
    candidates = []
    if environment.get("CUDA_HOME"):
        candidates.append(Path(environment["CUDA_HOME"]) / "bin" / "nvcc")
    found = shutil.which("nvcc", path=environment.get("PATH"))
    candidates += [Path(found)] if found else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in candidates:
        if path.is_file():
            return Found(path, nvcc_version(path), "this machine")
    target = work / "cuda"
    path = target / CUDA_IN_WHEELS / "bin" / "nvcc"
    if not path.is_file():
        install(target, CUDA_WHEELS, "installing nvcc")
        name_libraries(target / CUDA_IN_WHEELS)
    return Found(path, nvcc_version(path), "PyPI, " + CUDA_WHEELS[0])


def name_libraries(toolkit: Path) -> None:
    """Give the libraries of the wheels the names and places that NVIDIA's installer gives them."""
    (toolkit / "lib64").symlink_to("lib")
    for library in (toolkit / "lib").glob("lib*.so.*"):
        plain = library.with_name(library.name.split(".so.")[0] + ".so")
        if not plain.exists():
            plain.symlink_to(library.name)


def nvcc_version(path: Path) -> str:
    """Release of an nvcc; raise BuildError when it is too old."""
    text = run([str(path), "--version"], str(path))
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise BuildError(f"{path} --version says nothing of a release.")
    version = (int(match.group(1)), int(match.group(2)))
    if version < OLDEST_NVCC:
        raise BuildError(f"{path} is CUDA {dotted(version)}; the kernels need 12.0 or newer.")
    return dotted(version)


def find_program(name: str, work: Path, environment: dict[str, str]) -> Found:
    """The program of that name, cmake or ninja: on PATH, or from PyPI."""
    found = shutil.which(name, path=environment.get("PATH"))
    if found:
        return Found(Path(found), first_number(run([found, "--version"], name)), "this machine")
    target = program_folder(work, name)
    path = target / "bin" / name
    if not path.is_file():
        install(target, (name,), f"installing {name}")
    version = first_number(run([str(path), "--version"], name, with_modules(work, environment)))
    return Found(path, version, f"PyPI, {name}")


def program_folder(work: Path, name: str) -> Path:
    """Where pip puts one program and its modules."""
    return work / "programs" / name


def with_modules(work: Path, environment: dict[str, str]) -> dict[str, str]:
    """An environment in which programs that pip brought find their modules."""
    folders = [str(program_folder(work, name)) for name in ("cmake", "ninja")]
    return environment | {"PYTHONPATH": os.pathsep.join(folders)}


def find_compiler(environment: dict[str, str]) -> Found:
    """The host compiler; raise BuildError when there is none: PyPI has no usual one."""
    name = environment.get("CXX", "g++")
    found = shutil.which(name, path=environment.get("PATH"))
    if found is None:
        raise BuildError(
            f"There is no C++ compiler: {name} is not on PATH.\n"
            "  Install one: apt-get install g++ (or set CXX)."
        )
    return Found(Path(found), first_number(run([found, "--version"], name)), "this machine")


def install(target: Path, packages: tuple[str, ...], what: str) -> None:
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
    run(command, what, dict(os.environ))


def first_number(text: str) -> str:
    """The first version in a text."""
    match = re.search(r"\d+(\.\d+)+", text)
    return match.group(0) if match else "?"


def dotted(version: tuple[int, ...]) -> str:
    """(10, 3) -> '10.3'."""
    return ".".join(map(str, version))
