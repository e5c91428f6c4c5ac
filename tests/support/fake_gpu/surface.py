"""The names that TensorRT's real bindings have: `python surface.py WHEEL... > surface.json`.

The bindings are Python alone (PyPI: tensorrt-cu12-bindings), unpacked into folders that are named
by their version. Nothing of TensorRT is called: the three libraries behind them are stand-ins of
nine functions. An interpreter of each wheel's own minor version is looked for.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
_LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
CLASSES = (
    "Builder", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILogger", "INetworkDefinition",
    "IOptimizationProfile",
    "IPluginRegistry", "IStreamReader", "IStreamReaderV2", "LayerInformationFormat", "Logger",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "PreviewFeature",
    "ProfilingVerbosity", "Runtime", "SeekPosition", "TensorLocation",
)  # fmt: skip


def names_of(module: object) -> dict[str, list[str]]:
    """Public names of the classes above, where a module has them."""
    found = {}
    for name in CLASSES:
        if hasattr(module, name):
            found[name] = sorted(n for n in dir(getattr(module, name)) if not n.startswith("_"))
    return found


def names_of_wheel(folder: Path) -> dict[str, list[str]] | None:
    """The same of an unpacked wheel, in a process of its own; None without its Python."""
    tag = next(folder.glob("*.dist-info/WHEEL")).read_text(encoding="utf-8")
    minor = tag.partition("Tag: cp3")[2].partition("-")[0]
    python = shutil.which(f"python3.{minor}")
    if python is None:
        return None
    command = [python, __file__, "--within", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def _names_within(folder: Path) -> dict[str, list[str]]:
    """The names of an unpacked wheel of this interpreter, over stand-ins for its libraries."""
    major = folder.name.partition(".")[0]
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "stand_in.c")
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
        for library in _LIBRARIES:
            name = f"lib{library}.so.{major}"
            made = str(Path(place, name))
            subprocess.run(
                ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", made, str(source)],
                check=True,
            )
            ctypes.CDLL(made, ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(folder))
    from tensorrt_bindings import tensorrt

    return names_of(tensorrt)


if __name__ == "__main__":
    if sys.argv[1] == "--within":
        print(json.dumps(_names_within(Path(sys.argv[2]))))
    else:
        wheels = {Path(name).name: names_of_wheel(Path(name)) for name in sys.argv[1:]}
        print(json.dumps(wheels, indent=1, sort_keys=True))
