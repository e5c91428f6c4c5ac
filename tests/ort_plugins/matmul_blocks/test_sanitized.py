"""The products by themselves: under sanitizers, and with the same bits on every architecture."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.kernels import cpu_library
from pipeline.kernels.cpu_library import FOLDER, why_no_kernels
from pipeline.machine import cpu_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels())),
]
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# AVX-VNNI by the same instruction of AVX-512, which more processors have.
FOURS = (
    "-mavx2", "-mfma", "-mf16c", "-mavx512vl", "-mavx512vnni", "-DSKIPCAT_AVX_VNNI",
    "-DSKIPCAT_BY_AVX512",
)  # fmt: skip
CASES = ("60", "0")
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
CAN_EMULATE = shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)


def built(folder: Path, compiler: list[str], architecture: str, *further: str) -> Path:
    """The program of `check/compare.cpp`."""
    sources = [
        (name, FOURS if "-DSKIPCAT_AVX_VNNI" in own else own)
        for name, own in cpu_library.units(architecture)
        if name == "round_row.cpp" or name.startswith("tile_")
    ]
    sources.append(("check/compare.cpp", ()))
    objects = [folder / f"{place}.o" for place in range(len(sources))]
    running = []
    for (name, own), target in zip(sources, objects, strict=True):
        flags = (*cpu_library._FLAGS, *own, *further)
        command = [*compiler, *flags, "-c", str(FOLDER / name), "-o", str(target)]
        running.append(subprocess.Popen(command))
    assert [process.wait() for process in running] == [0] * len(running)
    made = folder / "compare"
    subprocess.run([*compiler, *further, *map(str, objects), "-o", str(made)], check=True)
    return made


def ran(*command: str) -> dict[str, str]:
    """Digests of all that was computed, by kind of instructions."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, ""), answer.stdout
    return dict(line.split() for line in answer.stdout.splitlines())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = cpu_library._compiler()
    assert compiler is not None
    return built(tmp_path_factory.mktemp("sanitized"), compiler, platform.machine(), *SANITIZERS)


@pytest.mark.parametrize("seed", ["0", "1"])
def test_products_of_random_matrices_stay_in_their_memory_and_agree_with_sums_in_double(
    program: Path, seed: str
) -> None:
    kinds = ran(str(program), CASES[0], seed)
    wide = {"avx512", "avx-vnni"} if "avx512_vnni" in cpu_flags() else set()
    assert kinds.keys() >= wide | {"avx2" if platform.machine() == "x86_64" else "neon"}
    assert len(set(kinds.values())) == 1  # all of them compute the same bits


@pytest.mark.skipif(not CAN_EMULATE, reason=f"no {CROSS_COMPILER}, or no {EMULATOR}")
def test_an_arm_processor_computes_the_same_bits(program: Path, tmp_path: Path) -> None:
    other = built(tmp_path, [CROSS_COMPILER], "aarch64", "-static")
    (arm,) = ran(EMULATOR, str(other), *CASES).items()
    assert arm == ("neon", next(iter(ran(str(program), *CASES).values())))
