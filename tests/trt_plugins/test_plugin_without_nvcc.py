"""The plugin library with its kernels compiled for the CPU, in the hands of the harness.

The library as users build it is in `block_skip/test_plugin.py`: nvcc takes minutes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import InputError
from tests.support.emulated import KERNELS, cuda_headers
from tests.support.tiny_graph import cache_write_nodes, write_export
from trt_plugins.toolchain import WORK, find_headers

CMAKE = (KERNELS / "CMakeLists.txt").read_text(encoding="utf-8")
FOLDERS = {
    "LATENT": KERNELS.with_name("latent_attention"),
    "CACHE_WRITE": KERNELS.with_name("cache_write"),
}
INCLUDED = [f"-I{folder}" for folder in (KERNELS, *FOLDERS.values())]


def sources(target: str) -> list[Path]:
    """What CMakeLists.txt compiles for a target."""
    words = re.search(rf"add_\w+\({target}\b([^)]*)\)", CMAKE)
    assert words is not None
    names = [word for word in words[1].split() if word not in ("STATIC", "SHARED")]
    for variable, folder in FOLDERS.items():
        names = [name.replace(f"${{{variable}}}", str(folder)) for name in names]
    return [KERNELS / name for name in names]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The harness, and the library."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    try:
        tensorrt = find_headers(WORK, {}).path
    except InputError as error:
        pytest.skip(f"no TensorRT headers: {error}")
    cuda, folder = cuda_headers(), tmp_path_factory.mktemp("plugin")
    common = ["g++", "-std=c++17", "-O0", "-fPIC", "-w", *INCLUDED]
    common += ["-isystem", str(tensorrt), "-isystem", str(cuda)]
    kernels, library, harness = map(sources, ("block_skip_kernel", "skipcat_block_skip", "harness"))

    def compiled(source: Path) -> str:
        emulated = ["-DSKIPCAT_EMULATE", "-x", "c++"] if source in kernels else []
        target = folder / f"{source.parent.parent.name}-{source.parent.name}-{source.name}.o"
        subprocess.run([*common, *emulated, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    files = list(dict.fromkeys([*kernels, *library, *harness]))
    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip(files, pool.map(compiled, files), strict=True))
    found = [cuda.parent / name for name in ("lib64", "lib")]
    libraries = [f"-L{place}" for place in found if place.is_dir()]
    libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    program, shared = folder / "harness", folder / "library.so"
    for target, of, flags in ((program, harness, []), (shared, kernels + library, ["-shared"])):
        command = ["g++", *flags, *(objects[source] for source in of), "-o", str(target)]
        subprocess.run([*command, *libraries], check=True)
    return program, shared


def run(built: tuple[Path, Path], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*map(str, built), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_harness_finds_no_fault_in_the_interface(built: tuple[Path, Path]) -> None:
    answer = run(built)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert int(answer.stdout.split()[-4]) >= 900, "checks"


def test_every_node_that_writes_a_cache_is_taken(built: tuple[Path, Path], tmp_path: Path) -> None:
    source = write_export(tmp_path / "onnx", profile="compat-static")
    lines = cache_write_nodes(source / "model.onnx")
    assert len(lines) == 2
    nodes = tmp_path / "nodes"
    nodes.write_text("\n".join(lines) + "\n")
    answer = run(built, "--nodes", nodes)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    nodes.write_text(lines[0].replace("int32 1 3", "int32 1 2"))
    assert run(built, "--nodes", nodes).returncode == 1
