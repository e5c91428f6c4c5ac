"""Real builds with TensorRT for RTX, which needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.build import build_engine
from pipeline.engine.manifest import EngineRuntime, check_manifest
from pipeline.engine.plan import EngineRequest, plan_engine
from pipeline.engine.target import Target
from pipeline.errors import InputError, MissingPackageError, UsageError

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")

SM86 = Target("rtx", (8, 6), "a test")
SM89 = Target("rtx", (8, 9), "a test")
ORIN = Target("tensorrt", (8, 7), "a test")


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
