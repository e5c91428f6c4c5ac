"""The library that `make plugin` builds, in the hands of the harness and of a real registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WORK = ROOT / "build" / "plugin"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as users build it; again only where something changed."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    output = tmp_path_factory.mktemp("plugin")
    command = [sys.executable, str(ROOT / "tools" / "build_plugin.py"), "--output", str(output)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if "downloading" in answer.stderr or "installing" in answer.stderr:
        pytest.skip(f"PyPI is out of reach: {answer.stderr.strip().splitlines()[0]}")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return output / "libskipcat_block_skip.so"


def test_the_harness_finds_no_fault(library: Path, tmp_path: Path) -> None:
    report = tmp_path / "harness.json"
    command = [str(WORK / "tree" / "harness"), str(library), "--json", str(report)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    written = json.loads(report.read_text())
    assert written["failures"] == 0
    assert len(written["checks"]) >= 300


def test_the_harness_tells_usage_from_failure(library: Path) -> None:
    harness = str(WORK / "tree" / "harness")
    assert subprocess.run([harness], capture_output=True, check=False).returncode == 2
    missing = subprocess.run([harness, "/no/library.so"], capture_output=True, check=False)
    assert missing.returncode == 1
    assert b"cannot be loaded" in missing.stderr


def test_no_kernel_spills_registers(library: Path) -> None:
    rows = json.loads((WORK / "resources.json").read_text())
    assert {row["gpu"] for row in rows} >= {"sm_87", "sm_90"}
    assert [row for row in rows if row["spill_bytes"]] == []
    assert all(row["registers"] <= 255 for row in rows)


def test_the_library_offers_nothing_but_what_tensorrt_asks_for(library: Path) -> None:
    command = ["nm", "-D", "--defined-only", str(library)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    strong = [line.split()[-1] for line in answer.stdout.splitlines() if line.split()[-2] == "T"]
    assert sorted(strong) == ["getCreators", "setLoggerFinder"]


# In a process of its own: what a registry has loaded stays loaded.
REGISTER = """
import sys
import numpy as np
import tensorrt_rtx as trt
from pipeline.engine.standard import _load_plugin
from pipeline.export.contract import BLOCK_SKIP_OPS, LATENT_OPS, QUANTIZED_OPS
from pathlib import Path

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, message):
        self.lines.append(message)

logger = Logger()
builder = trt.Builder(logger)
found = _load_plugin(trt, Path(sys.argv[1]))
ours = sorted((c.name, c.version, c.namespace) for c in found)
print({one[0] for one in ours} == {*BLOCK_SKIP_OPS, *QUANTIZED_OPS, *LATENT_OPS})
print({one[1:] for one in ours})
registry = trt.get_plugin_registry()
creator = registry.get_creator("BlockSkipLinearA4B8", "1", "skipcat")

def fields(**numbers):
    return trt.PluginFieldCollection([
        trt.PluginField(name, np.array([number], dtype=np.int32), trt.PluginFieldType.INT32)
        for name, number in numbers.items()
    ])

phase = trt.TensorRTPhase.BUILD
print(creator.create_plugin("layer", fields(block_a=64, block_b=192), phase) is not None)
for bad in (dict(block_a=64), dict(block_a=7, block_b=64), dict(depth=1)):
    print(creator.create_plugin("layer", fields(**bad), phase))
"""


def test_a_real_registry_takes_it_and_its_creators_refuse_bad_fields(library: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    command = [sys.executable, "-c", REGISTER, str(library)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.strip().splitlines()
    assert lines == ["True", "{('1', 'skipcat')}", "True", "None", "None", "None"]
