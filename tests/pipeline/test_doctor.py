from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline import doctor
from pipeline.cli.main import main
from pipeline.doctor import Machine
from pipeline.gpu import Gpu

PLAIN = Machine(
    python="3.11.7",
    system="Linux x86_64",
    cores=2,
    cpu_flags=("avx2",),
    ram_bytes=24 << 30,
    ram_free_bytes=20 << 30,
    disk_free_bytes=50 << 30,
    versions={
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "onnx": "1.23.2",
        "onnxscript": "0.7.2",
        "onnxruntime": "1.31.1",
        "tensorrt-rtx": "1.7.1.116",
    },
    reasons={"GPU": "nvidia-smi is not installed"},
)
H200 = Gpu("NVIDIA H200", (9, 0), 143771, "580.1")
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24564, "580.1")


def verdict(machine: Machine, stage: str) -> doctor._StageVerdict:
    return next(found for found in machine.stages() if found.stage == stage)


def with_versions(machine: Machine, **versions: str) -> Machine:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return dataclasses.replace(machine, versions={**machine.versions, **named})


def test_without_a_gpu_rtx_engines_are_built_but_not_run() -> None:
    assert verdict(PLAIN, "engine, RTX").works
    assert "SM86" in verdict(PLAIN, "engine, RTX").why
    for stage in ("engine, standard TensorRT", "run, engine"):
        assert not verdict(PLAIN, stage).works
        assert "nvidia-smi is not installed" in verdict(PLAIN, stage).why


@pytest.mark.parametrize(
    ("stage", "package", "extra"),
    [("genai", "onnxruntime-genai", "cpu"), ("recover", "peft", "recover")],
)
def test_missing_package_names_the_extra_that_brings_it(
    stage: str, package: str, extra: str
) -> None:
    found = verdict(PLAIN, stage)
    assert not found.works
    assert package in found.why
    assert f"EXTRAS={extra}" in found.why


def test_rtx_engine_runs_on_an_rtx_card_and_not_on_a_hopper() -> None:
    assert verdict(dataclasses.replace(PLAIN, gpus=(RTX_4090,)), "run, engine").works
    hopper = verdict(dataclasses.replace(PLAIN, gpus=(H200,)), "run, engine")
    assert not hopper.works
    assert "9.0" in hopper.why


def test_standard_tensorrt_on_a_gpu_builds_and_runs() -> None:
    machine = dataclasses.replace(PLAIN, gpus=(H200,), nvcc="13.0", plugin="lib/plugin.so")
    machine = with_versions(machine, tensorrt="11.4")
    for stage in ("engine, standard TensorRT", "run, engine", "block-skip plugin"):
        assert verdict(machine, stage).works, stage


def test_a_plugin_that_is_not_built_names_the_command_that_builds_it() -> None:
    machine = with_versions(dataclasses.replace(PLAIN, gpus=(H200,)), tensorrt="11.4")
    found = verdict(machine, "block-skip plugin")
    assert not found.works
    assert "make plugin (with nvcc from PyPI)" in found.why
    assert "--embed-kernels" in found.why


def test_kernels_in_the_engine_are_not_promised_before_tensorrt_10_9() -> None:
    machine = dataclasses.replace(PLAIN, jetpack="L4T 36.4: JetPack 6.2")
    found = verdict(with_versions(machine, tensorrt="10.3.0"), "block-skip plugin")
    assert "--embed-kernels" not in found.why


def test_jetpack_6_gets_the_compat_profiles() -> None:
    machine = dataclasses.replace(PLAIN, jetpack="L4T 36.4: JetPack 6.2")
    found = verdict(with_versions(machine, tensorrt="10.3.0"), "engine, standard TensorRT")
    assert found.works
    assert "profiles compat-static and compat only" in found.why


def test_jetson_without_visible_tensorrt_says_where_it_is() -> None:
    machine = dataclasses.replace(PLAIN, jetpack="L4T 39.2: JetPack 7.2")
    found = verdict(machine, "engine, standard TensorRT")
    assert not found.works
    assert "--system-site-packages" in found.why


def test_old_onnxruntime_runs_only_the_compat_profile() -> None:
    found = verdict(with_versions(PLAIN, onnxruntime="1.24.4"), "run, ONNX on CPU")
    assert found.works
    assert "compat profile only" in found.why


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, "function body: no TensorRT"),
        ("8.6.2", "no IPluginV3"),
        ("10.3.0", "functions are stripped"),
        ("10.6.0.post2", "functions are stripped"),
        ("10.7.0", "whenever it is registered"),
        ("10.14.1.48", "whenever it is registered"),
        ("10.15.1.29", "plugin_namespace"),
        ("11.4.0.106", "plugin_namespace"),
    ],
)
def test_plugin_route_follows_the_tensorrt_version(version: str | None, expected: str) -> None:
    assert expected in doctor._plugin_route(version)


def test_plugin_is_never_promised_for_rtx() -> None:
    machine = dataclasses.replace(PLAIN, gpus=(RTX_4090,), nvcc="13.0")
    found = verdict(machine, "block-skip plugin")
    assert not found.works
    assert "function body" in found.why


def test_command_prints_json_that_agrees_with_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert all(fact["value"] for fact in report["facts"])
    assert all(stage["why"] for stage in report["stages"])
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert all(stage["stage"] in table for stage in report["stages"])


def test_a_compiler_that_does_not_answer_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for text, expected in (("release 12.6, V12.6.85", f"12.6 ({nvcc})"), ("rubbish", None)):
        nvcc.write_text(f"#!/bin/sh\necho '{text}'\n")
        nvcc.chmod(0o755)
        assert doctor._find_nvcc() == expected
