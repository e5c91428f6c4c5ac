"""Real builds with TensorRT for RTX, which needs no GPU."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.child_process import ChildEnd, run_to_end
from pipeline.engine.build import _LOG_FILE, _read_result, build_engine
from pipeline.engine.manifest import EngineRuntime, check_manifest
from pipeline.engine.plan import EngineRequest, plan_engine
from pipeline.engine.target import Target
from pipeline.errors import (
    InputError,
    MissingPackageError,
    PipelineError,
    ResourceError,
    UsageError,
)

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
SM86 = Target("rtx", (8, 6), "a test")
SM89 = Target("rtx", (8, 9), "a test")
ORIN = Target("tensorrt", (8, 7), "a test")
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


@pytest.fixture(scope="module")
def engine(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "sm86"
    build_engine(tiny_export, folder, EngineRequest(SM86))
    return folder


def read(engine: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((engine / "manifest.json").read_text())
    return manifest


def test_an_engine_folder_holds_the_plan_the_manifest_and_the_log_only(engine: Path) -> None:
    assert {path.name for path in engine.iterdir()} == {"engine.plan", "manifest.json", "build.log"}
    assert "Engine generation completed" in (engine / "build.log").read_text()


def test_the_function_bodies_are_inlined_into_native_layers(engine: Path) -> None:
    manifest = read(engine)
    assert manifest["block_skip"] == {"path": "function body", "nodes": 2, "plugin": None}
    assert "PLUGIN_V3" not in manifest["layer_types"]
    # Three projections and the head, and two products for each block-skip node.
    assert manifest["layer_types"]["MATRIX_MULTIPLY"] >= 7


def test_cache_and_attention_stay_fused_layers(engine: Path) -> None:
    types = read(engine)["layer_types"]
    assert types["KV_CACHE_UPDATE"] == 2
    assert types["ATTENTION_INPUT"] == types["ATTENTION_OUTPUT"] == 1


def test_the_manifest_states_target_version_limits_and_cost(engine: Path) -> None:
    manifest = read(engine)
    assert manifest["target"] == {
        "flavour": "rtx",
        "compute_capability": [8, 6],
        "reason": "a test",
    }
    assert manifest["tensorrt_version"] == trt.__version__
    assert manifest["limits"] == {"max_batch": 1, "max_prefill": 16, "max_length": 16}
    assert manifest["plan"]["bytes"] == (engine / "engine.plan").stat().st_size
    assert manifest["build"]["peak_memory_bytes"] > 50e6
    assert [profile["name"] for profile in manifest["profiles"]] == ["decode", "prefill"]
    assert any("lowered from 1024 to 16" in note for note in manifest["notes"])


def test_no_profile_is_inconsistent_in_tensorrts_eyes(engine: Path) -> None:
    assert "self-consistent" not in (engine / "build.log").read_text()


@pytest.mark.parametrize(("target", "batch"), [(SM89, 1), (SM86, 4)])
def test_other_targets_and_batches_build(
    tiny_export: Path, tmp_path: Path, target: Target, batch: int
) -> None:
    manifest = build_engine(
        tiny_export, tmp_path / "engine", EngineRequest(target, max_batch=batch)
    )
    assert manifest["target"]["compute_capability"] == list(target.compute_capability or ())
    assert manifest["profiles"][1]["shapes"]["input_ids"]["max"] == [batch, 16]


def test_a_growing_cache_builds(tmp_path: Path, export_writer: Callable[..., Path]) -> None:
    source = export_writer(tmp_path / "onnx", profile="compat")
    manifest = build_engine(source, tmp_path / "engine", EngineRequest(SM86))
    past = manifest["profiles"][0]["shapes"]["past_key_values.0.key"]
    assert (past["min"][2], past["max"][2]) == (0, 15)
    assert "self-consistent" not in (tmp_path / "engine" / "build.log").read_text()


def test_separate_decode_weights_can_be_asked_for(tiny_export: Path, tmp_path: Path) -> None:
    manifest = build_engine(
        tiny_export, tmp_path / "engine", EngineRequest(SM86, decode="separate")
    )
    assert manifest["decode_profile"] == "separate"
    assert manifest["profiles"][0]["shapes"]["input_ids"]["max"] == [1, 1]


def test_a_workspace_limit_reaches_the_manifest(tiny_export: Path, tmp_path: Path) -> None:
    manifest = build_engine(
        tiny_export, tmp_path / "engine", EngineRequest(SM86, workspace_bytes=1 << 28)
    )
    assert manifest["workspace_bytes"] == 1 << 28


def test_a_graph_the_parser_refuses_names_the_node_and_leaves_nothing(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    source = export_writer(tmp_path / "onnx", linear="unknown.Mystery", block_skip_nodes=0)
    with pytest.raises(InputError, match="cannot parse") as caught:
        build_engine(source, tmp_path / "engine", EngineRequest(SM86))
    assert "Mystery" in caught.value.details["observed"]
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_a_build_that_takes_too_long_leaves_nothing(tiny_export: Path, tmp_path: Path) -> None:
    from pipeline.errors import ResourceError

    with pytest.raises(ResourceError, match="too long"):
        build_engine(tiny_export, tmp_path / "engine", EngineRequest(SM86, timeout_s=0.01))
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_is_refused_for_rtx_before_anything_is_built(
    tiny_export: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no plugins"):
        build_engine(
            tiny_export, tmp_path / "engine", EngineRequest(SM86, plugin=tmp_path / "plugin.so")
        )


def test_kernels_come_from_a_library_or_the_engine_and_not_both(
    tiny_export: Path, tmp_path: Path
) -> None:
    hopper = Target("tensorrt", (9, 0), "test")
    request = EngineRequest(hopper, plugin=tmp_path / "plugin.so", embed=True)
    with pytest.raises(UsageError, match="not both"):
        build_engine(tiny_export, tmp_path / "engine", request)


def test_a_float32_export_is_refused_before_the_library_is_loaded(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    source = export_writer(tmp_path / "onnx", dtype="float32")
    with pytest.raises(InputError, match="float16"):
        build_engine(source, tmp_path / "engine", EngineRequest(ORIN))


def test_the_cpu_target_needs_no_engine(tiny_export: Path) -> None:
    with pytest.raises(UsageError, match="needs no engine"):
        plan_engine(tiny_export, EngineRequest(Target("cpu", None, "a test")))


def test_a_flavour_that_is_not_installed_names_its_extra(tiny_export: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("standard TensorRT is installed here")
    with pytest.raises(MissingPackageError) as caught:
        plan_engine(tiny_export, EngineRequest(ORIN))
    assert "EXTRAS=trt" in caught.value.details["change"]


def test_an_existing_engine_is_kept_unless_overwrite_is_given(
    tiny_export: Path, engine: Path
) -> None:
    before = (engine / "engine.plan").stat().st_mtime_ns
    with pytest.raises(UsageError, match="exists"):
        build_engine(tiny_export, engine, EngineRequest(SM86))
    assert (engine / "engine.plan").stat().st_mtime_ns == before


def test_the_manifest_of_a_fresh_engine_passes_its_check(engine: Path, tiny_export: Path) -> None:
    runtime = EngineRuntime("rtx", trt.__version__, (8, 6))
    assert check_manifest(engine, tiny_export, runtime) == read(engine)


def run_python(code: str, folder: Path, timeout_s: float = 30, *arguments: str) -> ChildEnd:
    return run_to_end([sys.executable, "-c", code, *arguments], folder / _LOG_FILE, timeout_s)


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
        _read_result(end, tmp_path, 30)
    assert "SIGABRT" in caught.value.details["observed"]


def test_a_killed_worker_is_reported_as_out_of_memory(tmp_path: Path) -> None:
    end = run_python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    with pytest.raises(ResourceError, match="memory"):
        _read_result(end, tmp_path, 30)


def test_an_abort_for_lack_of_memory_is_not_blamed_on_the_graph(tmp_path: Path) -> None:
    code = "import os; print('std::bad_alloc', flush=True); os.abort()"
    with pytest.raises(ResourceError, match="memory"):
        _read_result(run_python(code, tmp_path), tmp_path, 30)


def test_a_worker_beyond_its_time_is_killed_and_reported(tmp_path: Path) -> None:
    started = time.monotonic()
    end = run_python("import time; print('working', flush=True); time.sleep(60)", tmp_path, 1.0)
    assert time.monotonic() - started < 20
    with pytest.raises(ResourceError, match="too long") as caught:
        _read_result(end, tmp_path, 1.0)
    assert "working" in caught.value.details["observed"]


def test_a_worker_that_fails_without_an_answer_is_an_internal_error_with_its_log(
    tmp_path: Path,
) -> None:
    end = run_python("raise RuntimeError('a defect')", tmp_path)
    with pytest.raises(PipelineError, match="status 1") as caught:
        _read_result(end, tmp_path, 30)
    assert caught.value.exit_status == 1
    assert "a defect" in caught.value.details["observed"]


def test_the_workers_own_error_keeps_its_status_and_details(tmp_path: Path) -> None:
    error = {"what": "No.", "details": {"observed": "this", "change": "that"}}
    (tmp_path / "result.json").write_text(json.dumps({"error": error}))
    with pytest.raises(InputError, match="No") as caught:
        _read_result(ChildEnd(3, timed_out=False), tmp_path, 30)
    assert caught.value.details == error["details"]
