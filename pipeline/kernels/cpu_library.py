"""The library of operators for ONNX Runtime on the CPU: compiled when first needed, and kept.

It lies in the user's cache, under a name made of everything it depends on. Where it cannot be had,
ONNX Runtime runs the bodies of the operators, slower, and it is said.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import InputError, PipelineError
from pipeline.machine import cpu_flags
from pipeline.progress import note
from pipeline.remembered import cache_folder

FOLDER = Path(__file__).parents[2] / "ort_plugins" / "matmul_blocks"
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
)  # fmt: skip
# Sources of every library.
_COMMON = (
    "multiply.cpp",
    "operators.cpp",
    "round_row.cpp",
    "stored_matrix.cpp",
    "weight_memory.cpp",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")


class _Kernels(NamedTuple):
    """What is compiled for an architecture.

    Attributes:
        tiles: sources, and the instructions that each is compiled for; which of them run is found
            out as they load.
        least: the flag of CPU_FLAGS that a processor must have for any of them.
        lacking: what to say of one that does not.
        choices: their names, the widest first.
    """

    tiles: tuple[tuple[str, tuple[str, ...]], ...]
    least: str
    lacking: str
    choices: tuple[str, ...]


_ARCHITECTURES = {
    "x86_64": _Kernels(
        (
            ("tile_avx2.cpp", _AVX2),
            ("tile_avx2.cpp", (*_AVX2, "-mavxvnni", "-DSKIPCAT_AVX_VNNI")),
            (
                "tile_avx512.cpp",
                (
                    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma",
                    "-mf16c", "-mprefer-vector-width=512",
                ),
            ),
        ),
        "avx2",
        "AVX2",
        ("avx512", "avx-vnni", "avx2"),
    ),
    "aarch64": _Kernels(
        (("tile_neon.cpp", ("-march=armv8.2-a+dotprod",)),),
        "asimddp",
        "dot products (ARMv8.2)",
        ("neon",),
    ),
}  # fmt: skip
# What the kernels choose among, and what chooses for them; `off` takes the bodies.
CHOICE = "SKIPCAT_KERNELS"
OFF = "off"


def units(architecture: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Sources of the library for an architecture, and the flags of each."""
    return (*((name, ()) for name in _COMMON), *_ARCHITECTURES[architecture].tiles)


def why_no_kernels() -> str | None:
    """Why this machine runs the bodies of the operators; None where it has or can make the kernels.

    Raises:
        InputError: SKIPCAT_KERNELS names no kernels.
    """
    chosen = os.environ.get(CHOICE, "")
    choices = [choice for kernels in _ARCHITECTURES.values() for choice in kernels.choices]
    if chosen not in ("", OFF, *choices):
        raise InputError(
            f"{CHOICE} names no kernels.",
            observed=chosen,
            expected=", ".join([*choices, OFF]),
        )
    if chosen == OFF:
        return f"{CHOICE}={OFF}"
    kernels = _ARCHITECTURES.get(platform.machine())
    if kernels is None or not sys.platform.startswith("linux"):
        return f"there are none for {platform.system()} on {platform.machine()}"
    if chosen and chosen not in kernels.choices:
        return f"{CHOICE}={chosen} is of another architecture than {platform.machine()}"
    if kernels.least not in cpu_flags():
        return f"this processor has no {kernels.lacking}"
    if _compiler() is None:
        return "there is no C++ compiler (apt install g++)"
    return None


@cache
def cpu_library() -> Path | None:
    """The compiled operators; None where their bodies run, which is said once.

    Raises:
        InputError: SKIPCAT_KERNELS names no kernels.
    """
    reason = why_no_kernels()
    if reason is None:
        try:
            return _built(_compiler() or [])
        except PipelineError as error:
            reason = str(error)
        except (OSError, RuntimeError) as error:
            reason = f"they cannot be kept: {error}"
    note(f"products of codes run in ONNX Runtime's own kernels, which are slower: {reason}")
    return None


def _compiler() -> list[str] | None:
    """The command of a C++ compiler: of CXX, or the first that is there."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shlex.split(chosen)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return None if found is None else [found]


def _built(compiler: list[str]) -> Path:
    """The library, compiled unless it is there."""
    folder = cache_folder() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"matmul_blocks-{_digest(compiler)}.so"
    if not target.is_file():
        # Here, for a session that finds the library should not wait for these imports.
        from pipeline.kernels.build import make_once

        message = "compiling the kernels for the CPU, once, some ten seconds"
        make_once(target, message, lambda: _compile(compiler, target))
    return target


def _digest(compiler: list[str]) -> str:
    """Differs whenever the compiled library would."""
    digest = hashlib.sha256(repr((compiler, _FLAGS, units(platform.machine()))).encode())
    for path in sorted(p for p in FOLDER.iterdir() if p.suffix in (".cpp", ".h")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], target: Path) -> None:
    """Compile every source by itself and link them; `target` appears only when all succeeded.

    Raises:
        InputError: the compiler fails, with the end of what it printed.
    """
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    from trt_plugins.toolchain import run_program

    what = "compiling the kernels for the CPU (needs g++ 11 or clang 14, or newer)"
    wanted = units(platform.machine())
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, ThreadPoolExecutor() as pool:
        objects = [str(Path(scratch) / f"{place}.o") for place in range(len(wanted))]
        commands = [
            [*compiler, *_FLAGS, *flags, "-c", str(FOLDER / name), "-o", made]
            for (name, flags), made in zip(wanted, objects, strict=True)
        ]
        list(pool.map(lambda command: run_program(command, what), commands))
        linked = Path(scratch) / target.name
        run_program([*compiler, "-shared", *objects, "-o", str(linked)], what)
        linked.replace(target)
