"""What the ONNX folder holds is said once, and what is said of it elsewhere is read there."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pipeline import doctor
from pipeline.cli.export import command
from pipeline.doctor import Machine
from pipeline.engine.standard import _require_version
from pipeline.errors import InputError
from pipeline.export import contract
from pipeline.export.contract import (
    COMPAT,
    COMPAT_STATIC,
    CPU,
    OPSET24,
    PROFILES,
    cache_names,
    dotted,
)
from pipeline.export.request import ExportRequest
from pipeline.quantize.formats import RUNTIMES

ROOT = Path(__file__).parents[3]
SOURCES = [path for folder in ("pipeline", "validate") for path in (ROOT / folder).rglob("*.py")]
OF_TENSORRT = [profile for profile in PROFILES.values() if profile.oldest_tensorrt is not None]
# Names of others that are spelt alike.
SPELT_ALIKE = {
    "pipeline/calibrate/text.py": {"input_ids"},  # what a tokenizer of transformers returns
    "validate/harness.py": {"input_ids"},
    "pipeline/calibrate/images.py": {"pixel_values"},  # of an image processor, and in an .npz
    "pipeline/model/classifier_structure.py": {"logits"},  # of a model's output
    "pipeline/model/task.py": {"pixel_values", "export.json"},  # below the contract
    "pipeline/export/cache_shape.py": {"past_key_values"},  # of a model's output
    "pipeline/driving/network.py": {"pixel_values"},  # what a model of transformers is given
    "pipeline/driving/preprocess.py": {"pixel_values"},  # and its image processor returns
    "pipeline/driving/evaluate.py": {"pixel_values"},
    "pipeline/calibrate/driving_images.py": {"pixel_values"},
    "validate/driving.py": {"pixel_values"},
    # What a model of transformers is given.
    "pipeline/runtime/offload/side_by_side.py": {"input_ids", "past_key_values", "position_ids"},
    "pipeline/checkpoint/modeling_cache.py": {"past_key_values"},
    "pipeline/compress/cache/key_rotations.py": {"past_key_values"},
    "pipeline/runtime/device/preflight.py": {"logits"},  # what their memory is for
    "pipeline/runtime/device/bundle.py": {"logits"},  # of an answer in a bundle's record
    "pipeline/bundle/write.py": {"logits"},
    "pipeline/kernels/install.py": {"stored"},  # a buffer of a module
    "pipeline/checkpoint/card.py": {"opset24"},  # below the contract
    "pipeline/output.py": {"export.json"},  # one of all records, on the ground floor
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return modules | {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}


def literals(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_names_of_the_contract_are_written_nowhere_else() -> None:
    names = {
        contract.GRAPH_FILE, contract.WEIGHTS_FILE, contract.RECORD_FILE, contract.GENAI_FILE,
        *contract.TOKEN_INPUTS, contract.FIRST_LOGIT, contract.PIXEL_VALUES, contract.LOGITS,
        contract.CACHE_PREFIX, contract.CACHE_PREFIX.removesuffix("."), contract.CONTRIB,
        *contract.BLOCK_SKIP_OPS, *contract.QUANTIZED_OPS, *contract.DEQUANTIZED_SKIP_OPS,
        contract.LINEAR_QUANTIZED, contract.BLOCK_A, contract.BLOCK_B, contract.MATMUL_NBITS,
        contract.GATHER_NBITS, contract.GROUPED_ATTENTION, contract.DEQUANTIZE,
        OPSET24, COMPAT, contract.INT4_OFFSET, contract.STORED,
    }  # fmt: skip
    found = {
        name: sorted((names & literals(path)) - SPELT_ALIKE.get(name, set()))
        for path in SOURCES
        if (name := path.relative_to(ROOT).as_posix()) != "pipeline/export/contract.py"
    }
    assert {name: strings for name, strings in found.items() if strings} == {}


def test_reading_the_contract_loads_nothing_heavy() -> None:
    code = "import sys, pipeline.export.contract; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {"torch", "onnx", "numpy", "transformers"} & set(run.stdout.split())


@pytest.mark.parametrize("package", ["export", "checkpoint"])
def test_later_stages_and_compress_are_not_imported(package: str) -> None:
    for path in (ROOT / "pipeline" / package).rglob("*.py"):
        others = {name for name in imported(path) if name.startswith("pipeline.")}
        rooms = {name.split(".")[1] for name in others}
        assert not rooms & {"compress", "engine", "runtime", "vision"}, path.name


@pytest.mark.parametrize("profile", OF_TENSORRT, ids=lambda profile: profile.name)
def test_the_oldest_tensorrt_is_the_same_wherever_it_is_said(profile: contract.Profile) -> None:
    oldest = profile.oldest_tensorrt
    assert oldest is not None
    version = dotted(oldest)
    assert f"TensorRT >= {version}" in profile.runs_in
    options = {parameter.name: parameter for parameter in command.params}
    option = options["profile"]
    assert isinstance(option, click.Option)
    assert profile.help in str(option.help)
    assert version in profile.help
    _require_version(oldest, profile.name)
    with pytest.raises(InputError, match=rf"TensorRT {version} or newer"):
        _require_version((oldest[0], oldest[1] - 1), profile.name)
    assert f"TensorRT >= {version}" in (ROOT / "docs/onnx.md").read_text(encoding="utf-8")


def test_compat_is_for_jetpack_6() -> None:
    # JetPack 6.1 and 6.2 have TensorRT 10.3.
    assert PROFILES[COMPAT].oldest_tensorrt == (10, 3)


def test_the_doctor_draws_the_line_where_the_profile_does() -> None:
    onnxruntime = PROFILES[OPSET24].oldest_onnxruntime
    for version, takes in ((onnxruntime, True), ((onnxruntime[0], onnxruntime[1] - 1), False)):
        machine = Machine(*(None for _ in dataclasses.fields(Machine)))  # type: ignore[arg-type]
        machine = dataclasses.replace(machine, cores=2, versions={"onnxruntime": dotted(version)})
        assert ("compat profile only" not in doctor._judge_onnx_cpu(machine).why) == takes


def test_choices_of_the_command_are_those_of_the_contract() -> None:
    choices = {
        parameter.name: list(parameter.type.choices)
        for parameter in command.params
        if isinstance(parameter.type, click.Choice)
    }
    assert choices == {
        "profile": list(PROFILES),
        "dtype": list(contract.DTYPES),
        "weights": list(contract.WEIGHTS),
        "products": list(contract.PRODUCTS),
        "cache": list(contract.CACHES),
    }
    for profile in PROFILES:
        ExportRequest(profile).check()


def test_a_profile_takes_the_formats_of_a_runtime() -> None:
    assert {profile.formats_of for profile in PROFILES.values()} <= set(RUNTIMES)
    assert [name for name, profile in PROFILES.items() if profile.fixed_length] == [
        OPSET24,
        COMPAT_STATIC,
    ]
    assert [name for name, profile in PROFILES.items() if profile.plugin_writes] == [COMPAT_STATIC]
    assert [name for name, profile in PROFILES.items() if profile.contrib] == [CPU]


def test_caches_are_named_layer_by_layer() -> None:
    assert cache_names(2) == [
        "past_key_values.0.key", "past_key_values.0.value",
        "past_key_values.1.key", "past_key_values.1.value",
    ]  # fmt: skip
    assert [contract.present_name(name) for name in cache_names(2)] == cache_names(
        2, contract.PRESENT
    )
