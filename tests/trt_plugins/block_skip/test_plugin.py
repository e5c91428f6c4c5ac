"""The library that `make plugin` builds, in the hands of the harness and of a real registry."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import NodeProto, TensorProto

from pipeline.export.contract import DOMAIN
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from tests.support.quantised_layers import save_low_bit_llama
from tests.support.unproven import unproven

# Compiling takes 100 s of two idle cores with AVX-512, and several times that on others.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
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
    assert len(written["checks"]) >= 900


TYPES: dict[int, str] = {
    TensorProto.FLOAT16: "half",
    TensorProto.INT8: "int8",
    TensorProto.INT32: "int32",
}


def described(node: NodeProto, kinds: dict[str, tuple[int, list[int]]]) -> str:
    """A node as the harness reads it (harness/nodes.cpp): 3 rows of x, weights as they are."""
    fields = [(item.name, item.i) for item in node.attribute if item.name.startswith("block")]
    weights = [kinds[name] for name in node.input[1:]]
    heights = [dims[0] for kind, dims in weights if kind == TensorProto.INT8 or len(dims) == 1]
    codes = [dims for kind, dims in weights if kind == TensorProto.INT8]
    scales = [dims for kind, dims in weights if kind == TensorProto.FLOAT16]
    assert len(codes) == len(fields) == len(scales), "every matrix of this model is codes"
    columns = sum(dims[0] for dims in codes)
    assert {*heights} <= {columns, *(dims[0] for dims in codes)}
    half = TensorProto.FLOAT16
    tensors = [(half, [1, 3, columns]), *weights, (half, [1, 3, scales[-1][1]])]
    words: list[object] = [node.name, node.op_type, len(fields)]
    words += [word for field in fields for word in field] + [len(tensors)]
    for kind, dims in tensors:
        words += [TYPES[kind], len(dims), *dims]
    return " ".join(map(str, words))


@pytest.mark.parametrize("profile", ["opset24", pytest.param("compat", marks=pytest.mark.slow)])
def test_every_node_of_an_exported_model_in_few_bits_is_taken(
    profile: str, library: Path, tmp_path: Path
) -> None:
    checkpoint = save_low_bit_llama(tmp_path / "checkpoint")
    with unproven():
        export_folder(checkpoint, tmp_path / "onnx", ExportRequest(profile, "float16", 48))
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    kinds = {weight.name: (weight.data_type, list(weight.dims)) for weight in graph.initializer}
    ours = [node for node in graph.node if node.domain == DOMAIN]
    # Two layers of four groups each, and the head; no linear weight is a number.
    assert len(ours) == 2 * 4 + 1
    assert not [
        node for node in graph.node if node.op_type == "MatMul" and {*node.input} & {*kinds}
    ]
    lines = [described(node, kinds) for node in ours]
    (tmp_path / "nodes").write_text("\n".join(lines) + "\n")
    command = [str(WORK / "tree" / "harness"), str(library), "--nodes", str(tmp_path / "nodes")]
    answer = subprocess.run(
        [*command, "--json", str(tmp_path / "report")], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads((tmp_path / "report").read_text())
    taken = [check for check in report["checks"] if check["what"].startswith("node ")]
    assert [check["good"] for check in taken] == [True] * len(ours)
    wrong = lines[0].replace(" int8 ", " half ", 1)
    (tmp_path / "nodes").write_text(wrong)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_the_harness_tells_usage_from_failure(library: Path) -> None:
    harness = str(WORK / "tree" / "harness")
    assert subprocess.run([harness], capture_output=True, check=False).returncode == 2
    missing = subprocess.run([harness, "/no/library.so"], capture_output=True, check=False)
    assert missing.returncode == 1
    assert b"cannot be loaded" in missing.stderr


def test_no_kernel_spills_registers_but_one_of_latents_on_an_orin(library: Path) -> None:
    rows = json.loads((WORK / "resources.json").read_text())
    assert {row["gpu"] for row in rows} >= {"sm_87", "sm_90"}
    spilling = {
        (row["gpu"], row["kernel"], row["variant"]): row["spill_bytes"]
        for row in rows
        if row["spill_bytes"]
    }
    # All 255 registers that a thread can have are taken.
    known = ("sm_87", "attend", "rebuilt, 16 rows, 32 tokens")
    assert spilling.keys() <= {known}
    assert spilling.get(known, 0) <= 256  # stores and loads
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
from pipeline.engine.standard import load_plugin
from pipeline.export.contract import PLUGIN_OPS
from pathlib import Path

class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []
    def log(self, severity, message):
        self.lines.append(message)

logger = Logger()
builder = trt.Builder(logger)
found = load_plugin(trt, Path(sys.argv[1]))
ours = sorted((c.name, c.version, c.namespace) for c in found)
print({one[0] for one in ours} == {*PLUGIN_OPS})
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
