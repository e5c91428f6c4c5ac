"""Compile the TensorRT plugin: `make plugin`.

Finds TensorRT's headers, nvcc, cmake and ninja (on this machine, else on PyPI), says what it found,
builds in build/plugin, and puts the library where `skipcat engine` looks for it once all has
succeeded. Prints what each kernel takes of the chip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.errors import InputError
from pipeline.gpu import SHARING_CAPABILITIES, find_gpu, find_gpus
from trt_plugins.toolchain import (
    OLDEST_CAPABILITY,
    WORK,
    Found,
    find_compiler,
    find_headers,
    find_nvcc,
    find_program,
    run_program,
    with_modules,
)

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "trt_plugins" / "block_skip"
LIBRARY = "libskipcat_block_skip.so"
# Jetson Orin and Hopper; Hopper's also as PTX, which newer GPUs compile for themselves.
ARCHITECTURES = "87-real;90"
# That nvcc takes at most for one file of kernels, and some to spare.
BYTES_OF_A_JOB = 2_000_000_000
TYPE_NAMES = {"6__half": "fp16", "13__nv_bfloat16": "bf16"}
# Of each kernel: its name, and what the number among its template's arguments is.
KERNELS = {
    "decodeProduct": ("decode, any alignment", ""),
    "streamProduct": ("decode", "copies of {} bytes"),
    "prefillProduct": ("prefill", "{} rows"),
    "gather": ("gather", ""),
}
LATENT_KERNELS = {
    "attendStretch": ("attend", "any latents"),
    "joinStretches": ("join", "any latents"),
    "walkContext": ("attend", ""),
    "joinWalks": ("join", ""),
}
# Types that the cache is written in pieces of, and their bytes.
PIECES = {"5uint4": 16, "j": 4, "t": 2, "h": 1}
WEIGHT_NAMES = {"0": "of its type", "4": "int4", "8": "int8"}


def architectures(chosen: str | None) -> str:
    """What to compile for: as chosen, a Jetson's own GPU, or the default and this machine's GPUs.

    On a Jetson every further architecture costs minutes, and nothing else runs what it built.
    """
    if chosen:
        return chosen
    gpu = find_gpu()
    if gpu is not None and gpu.capability in SHARING_CAPABILITIES:
        return "{}{}-real".format(*gpu.capability)
    wanted = ARCHITECTURES.split(";")
    for major, minor in sorted({gpu.capability for gpu in find_gpus()[0]}):
        number = 10 * major + minor
        if number >= OLDEST_CAPABILITY and f"{number}" not in {w.split("-")[0] for w in wanted}:
            wanted.insert(0, f"{number}-real")
    return ";".join(wanted)


def demangled(symbol: str) -> tuple[str, str, str, str]:
    """Kernel, type of x, weights and variant out of a mangled name of ours."""
    of_latents = rf"latent\d+({'|'.join(LATENT_KERNELS)})I(6__half|13__nv_bfloat16)"
    if latent := re.search(of_latents, symbol):
        kernel, described = LATENT_KERNELS[latent.group(1)]
        if walk := re.search(r"Li(\d)ELi(\d)ELb([01])E", symbol):
            form = "rebuilt" if walk.group(3) == "1" else "narrow"
            described = f"{form}, {8 * int(walk.group(1))} rows, {16 * int(walk.group(2))} tokens"
        return kernel, TYPE_NAMES[latent.group(2)], "", described
    if piece := re.search(rf"writeRowsI({'|'.join(PIECES)})E", symbol):
        return "write the cache", "any", "", f"pieces of {PIECES[piece.group(1)]} bytes"
    match = re.search(rf"skipcat\d+({'|'.join(KERNELS)})I(6__half|13__nv_bfloat16)", symbol)
    if match is None:
        return symbol, "", "", ""
    kernel, of_number = KERNELS[match.group(1)]
    weights = re.search(r"WeightTypeE(\d)", symbol)
    vector = re.search(r"ELb([01])E", symbol)
    number = re.search(r"ELi(\d+)E", symbol)
    variant = ["16-byte loads" if vector.group(1) == "1" else "any alignment"] if vector else []
    variant += [of_number.format(number.group(1))] if number else []
    return (
        kernel,
        TYPE_NAMES[match.group(2)],
        WEIGHT_NAMES[weights.group(1)] if weights else "",
        ", ".join(variant),
    )


def read_resources(log: str) -> list[dict[str, Any]]:
    """What ptxas says of every kernel: registers, stack, spills, by GPU."""
    rows: list[dict[str, Any]] = []
    for line in log.splitlines():
        start = re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line)
        if start:
            kernel, kind, weights, variant = demangled(start.group(1))
            rows.append(
                {"kernel": kernel, "x": kind, "weights": weights, "variant": variant}
                | {"gpu": start.group(2), "symbol": start.group(1)}
            )
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)
        if stack and rows:
            rows[-1]["stack_bytes"] = int(stack.group(1))
            rows[-1]["spill_bytes"] = int(stack.group(2)) + int(stack.group(3))
        used = re.search(r"Used (\d+) registers", line)
        if used and rows:
            rows[-1]["registers"] = int(used.group(1))
    return rows


def print_resources(rows: list[dict[str, Any]]) -> None:
    """A line for each kernel, the registers on every GPU side by side."""
    gpus = sorted({row["gpu"] for row in rows})
    table: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("kernel", "x", "weights", "variant"))
        table.setdefault(key, {})[row["gpu"]] = row
    print(
        f"\n{'kernel':<8} {'x':<5} {'weights':<12} {'variant':<26} registers on {', '.join(gpus)}"
    )
    for key, by_gpu in sorted(table.items()):
        numbers = "  ".join(str(by_gpu[gpu]["registers"]) if gpu in by_gpu else "-" for gpu in gpus)
        print(f"{key[0]:<8} {key[1]:<5} {key[2]:<12} {key[3]:<26} {numbers}")
    spilled = [row for row in rows if row.get("spill_bytes")]
    print(f"{len(rows)} kernels, {len(spilled)} of them spill registers")


def configure_and_build(work: Path, tools: dict[str, Found], wanted: str) -> str:
    """Run cmake twice; return the output of the compilers, kept from the run that made them."""
    environment = with_modules(work, dict(os.environ))
    cmake = str(tools["cmake"].path)
    tree = work / "tree"
    nvcc = tools["nvcc"].path
    run_program(
        [
            cmake, "-S", str(SOURCE), "-B", str(tree), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tools['ninja'].path}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCUDAToolkit_ROOT={nvcc.resolve().parents[1]}",
            f"-DTENSORRT_INCLUDE={tools['TensorRT headers'].path}",
            f"-DSKIPCAT_ARCHITECTURES={wanted}",
        ],
        "configuring",
        environment,
    )  # fmt: skip
    build = [cmake, "--build", str(tree), "--verbose", "--parallel", str(parallel_jobs())]
    output = run_program(build, "compiling", environment)
    log = work / "compile.log"
    # Nothing is compiled a second time, and then nothing is said.
    if "Compiling entry function" in output or not log.is_file():
        log.write_text(output, encoding="utf-8")
    return log.read_text(encoding="utf-8")


def parallel_jobs(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Files to compile at once: as many as there are cores, and as memory that is free holds."""
    cores = os.cpu_count() or 1
    try:
        free = re.search(r"^MemAvailable: +(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        free = None
    return cores if free is None else max(1, min(cores, int(free[1]) * 1024 // BYTES_OF_A_JOB))


def deliver(tree: Path, target: Path) -> Path:
    """Copy the library to where it is used, whole or not at all."""
    target.mkdir(parents=True, exist_ok=True)
    aside = target / (LIBRARY + ".tmp")
    shutil.copy2(tree / LIBRARY, aside)
    aside.replace(target / LIBRARY)
    return target / LIBRARY


def build(work: Path, target: Path, chosen: str | None) -> Path:
    """Find, compile, deliver and report; the library's path."""
    work.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    tools = {
        "TensorRT headers": find_headers(work, environment),
        "nvcc": find_nvcc(work, environment),
        "C++ compiler": find_compiler(environment),
        "cmake": find_program("cmake", work, environment),
        "ninja": find_program("ninja", work, environment),
    }
    for name, found in tools.items():
        print(f"{name:<17} {found.version:<10} {found.origin}: {found.path}")
    wanted = architectures(chosen)
    print(f"{'GPUs':<17} {wanted.replace(';', ', ')}", flush=True)
    rows = read_resources(configure_and_build(work, tools, wanted))
    (work / "resources.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    library = deliver(work / "tree", target)
    print_resources(rows)
    print(f"\nlibrary: {library} ({library.stat().st_size / 1e6:.1f} MB)")
    print(f"harness: {work / 'tree' / 'harness'} {library}")
    print(f"next:    skipcat engine ONNX_FOLDER -o ENGINE --target tensorrt --plugin {library}")
    return library


def main() -> int:
    """Parse the command line; 0 ok, 3 when something is missing or does not compile."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, default=SOURCE / "lib")
    parser.add_argument("--architectures", help=f"as CMake names them; default {ARCHITECTURES}")
    arguments = parser.parse_args()
    try:
        build(arguments.work.resolve(), arguments.output.resolve(), arguments.architectures)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
