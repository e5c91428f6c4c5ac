"""Ways a worker can end, with real processes."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from pipeline.child_process import ChildEnd, run_to_end
from pipeline.engine.child import LOG_FILE, read_result
from pipeline.errors import InputError, PipelineError, ResourceError

# Registers a plugin creator under the name the graph asks for. TensorRT for RTX then aborts in its
# C++ code while it parses, which Python cannot catch.
ABORTING_WORKER = """
import sys
import tensorrt_rtx as trt
from pipeline.engine import worker

class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    def __init__(self):
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuild.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name = "BlockSkipLinear"
        self.plugin_version, self.plugin_namespace = "1", "skipcat"
        self.num_outputs = 1

    def get_capability_interface(self, kind):
        return self

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = "BlockSkipLinear", "1", "skipcat"
        self.field_names = trt.PluginFieldCollection([])

    def create_plugin(self, name, fields, phase):
        return Plugin()

creator = Creator()
trt.get_plugin_registry().register_creator(creator, "skipcat")
sys.exit(worker.main(sys.argv[1:]))
"""


def run_python(code: str, folder: Path, timeout_s: float = 30, *arguments: str) -> ChildEnd:
    return run_to_end([sys.executable, "-c", code, *arguments], folder / LOG_FILE, timeout_s)


def test_an_abort_inside_tensorrt_becomes_an_error_with_the_log(
    tiny_export: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    request = {
        "flavour": "rtx",
        "compute_capability": [8, 6],
        "onnx_path": str(tiny_export / "model.onnx"),
        "profiles": [],
        "shared_weights": True,
        "workspace_bytes": None,
        "plugin": None,
        "block_skip_nodes": 2,
        "onnx_profile": "opset24",
    }
    request_path = tmp_path / "request.json"
    request_path.write_text(json.dumps(request))
    end = run_python(ABORTING_WORKER, tmp_path, 30, str(request_path))
    assert end.status == -signal.SIGABRT
    with pytest.raises(InputError, match="aborted") as caught:
        read_result(end, tmp_path, 30)
    assert "SIGABRT" in caught.value.details["observed"]


def test_a_killed_worker_is_reported_as_out_of_memory(tmp_path: Path) -> None:
    end = run_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    with pytest.raises(ResourceError, match="memory"):
        read_result(end, tmp_path, 30)


def test_an_abort_for_lack_of_memory_is_not_blamed_on_the_graph(tmp_path: Path) -> None:
    code = "import os; print('std::bad_alloc', flush=True); os.abort()"
    with pytest.raises(ResourceError, match="memory"):
        read_result(run_python(code, tmp_path), tmp_path, 30)


def test_a_worker_beyond_its_time_is_killed_and_reported(tmp_path: Path) -> None:
    started = time.monotonic()
    end = run_python("import time; print('working', flush=True); time.sleep(60)", tmp_path, 1.0)
    assert time.monotonic() - started < 20
    with pytest.raises(ResourceError, match="too long") as caught:
        read_result(end, tmp_path, 1.0)
    assert "working" in caught.value.details["observed"]


def test_a_worker_that_fails_without_an_answer_is_an_internal_error_with_its_log(
    tmp_path: Path,
) -> None:
    end = run_python("raise RuntimeError('a defect')", tmp_path)
    with pytest.raises(PipelineError, match="status 1") as caught:
        read_result(end, tmp_path, 30)
    assert caught.value.exit_status == 1
    assert "a defect" in caught.value.details["observed"]


def test_the_workers_own_error_keeps_its_status_and_details(tmp_path: Path) -> None:
    error = {"what": "No.", "details": {"observed": "this", "change": "that"}}
    (tmp_path / "result.json").write_text(json.dumps({"error": error}))
    with pytest.raises(InputError, match="No") as caught:
        read_result(ChildEnd(3, timed_out=False), tmp_path, 30)
    assert caught.value.details == error["details"]
