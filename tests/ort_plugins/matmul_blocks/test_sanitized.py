"""The products by themselves under the sanitizers of addresses and of undefined behaviour."""

from __future__ import annotations

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
SOURCES = ("round_row.cpp", "tile_avx2.cpp", "tile_avx512.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    compiler = cpu_library._compiler()
    assert compiler is not None
    # The AVX2 source once; its second unit is FOURS.
    flags_of = dict(reversed(cpu_library.UNITS))
    wanted = [(FOLDER / name, flags_of[name]) for name in SOURCES]
    wanted += [(FOLDER / "check" / "compare.cpp", ()), (FOLDER / "tile_avx2.cpp", FOURS)]
    objects = [folder / f"{place}.o" for place in range(len(wanted))]
    running = []
    for (path, own), target in zip(wanted, objects, strict=True):
        flags = (*cpu_library._FLAGS, *own, *SANITIZERS)
        command = [*compiler, *flags, "-c", str(path), "-o", str(target)]
        running.append(subprocess.Popen(command))
    assert [process.wait() for process in running] == [0] * len(running)
    made = folder / "compare"
    subprocess.run([*compiler, *SANITIZERS, *map(str, objects), "-o", str(made)], check=True)
    return made


@pytest.mark.parametrize("seed", [0, 1])
def test_products_of_random_matrices_stay_in_their_memory_and_agree_with_sums_in_double(
    program: Path, seed: int
) -> None:
    answer = subprocess.run(
        [str(program), "60", str(seed)], capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    ran = set(answer.stdout.split())
    assert ran >= ({"avx512", "avx-vnni"} if "avx512_vnni" in cpu_flags() else set()) | {"avx2"}
