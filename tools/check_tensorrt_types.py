"""Type-check what calls TensorRT against its published stubs: make lint-tensorrt.

The stubs and TensorRT's own `tensorrt.plugin` sources come from PyPI into build/tensorrt-types, not
into the environment: there, a `tensorrt` folder without the library would pass for TensorRT. One
release of the stubs is all there is, 10.13; `tensorrt.plugin` they leave out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipeline.errors import InputError
from trt_plugins.toolchain import pip

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "tensorrt-types"
STUBS = "tensorrt-stubs==10.13.0.35.1"
BINDINGS = "tensorrt-cu13-bindings==11.4.0.106"
PLUGIN_SOURCES = "tensorrt_bindings/plugin/"
CHECKED = (
    "pipeline/engine",
    "pipeline/runtime/sessions/tensorrt_session.py",
    "trt_plugins/block_skip",
)
# `public_api` sets these at run time; type checkers have to be told.
PUBLIC = {
    "_tensor": (
        "KernelLaunchParams", "ShapeExpr", "ShapeExprs", "SymExprs", "SymInt32", "SymIntExprs",
        "TensorDesc",
    ),
    "_lib": ("aot_impl", "autotune", "register"),
    "_autotune": ("AutoTuneCombination",),
    "_top_level": ("cdiv", "from_shape_expr"),
}  # fmt: skip


def fetch(folder: Path) -> None:
    """Put the stubs, and the plugin sources beside them, into a folder that appears whole.

    Raises:
        InputError: PyPI is out of reach.
    """
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    wheels = aside / "wheels"
    wheels.mkdir(parents=True)
    what = "downloading TensorRT's types"
    pip(["download", "--no-deps", "--dest", str(wheels), STUBS, BINDINGS], what)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".pyi"):
                    target = aside / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(mended(archive.read(name).decode()), encoding="utf-8")
                elif name.startswith(PLUGIN_SOURCES) and name.endswith(".py"):
                    target = aside / "tensorrt" / "plugin" / Path(name).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
    exports = (
        f"from tensorrt.plugin.{module} import {name} as {name}\n"
        for module, names in PUBLIC.items()
        for name in names
    )
    (aside / "tensorrt" / "plugin" / "__init__.pyi").write_text("".join(exports), encoding="utf-8")
    shutil.rmtree(wheels)
    aside.rename(folder)


def mended(stub: str) -> str:
    """A stub that Python can parse, and that takes tuples for Dims where the library does."""
    # Parameters called `in`, one that lacks its default, and pybind's implicit conversion.
    named = re.sub(r"([(,] ?)in: ", r"\1in_: ", stub)
    whole = re.sub(r"(def add_scale_nd\(.*channel_axis: \w+)\)", r"\1 = ...)", named)
    return re.sub(
        r"def set_shape\(.*",
        lambda line: line[0].replace(": Dims", ": Dims | tuple[int, ...]"),
        whole,
    )


def findings(output: str) -> list[str]:
    """Mypy's errors in this project's files; those in TensorRT's own are not ours to mend."""
    lines = [line for line in output.splitlines() if ": error:" in line]
    return [line for line in lines if not line.startswith(("build/", "/", "../"))]


def main() -> int:
    """Fetch once, check; 0 without findings, 1 with, 3 when it cannot be done."""
    try:
        if not FOLDER.is_dir():
            fetch(FOLDER)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    environment = os.environ | {"MYPYPATH": str(FOLDER)}
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(FOLDER / "cache"), *CHECKED]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    if "prevented further checking" in answer.stdout or answer.returncode > 1:
        print(f"error: mypy stopped:\n{answer.stdout[-2000:]}{answer.stderr}", file=sys.stderr)
        return 3
    found = findings(answer.stdout)
    print("\n".join(found) or f"no findings in {', '.join(CHECKED)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
