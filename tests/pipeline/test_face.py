"""`import pipeline` gives the stages by name, with nothing heavy imported, in any order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.compress.request import CompressRequest
from pipeline.errors import UsageError
from pipeline.runtime.sequence import Decoding
from tests.support.families import save_family

SMALL: dict[str, Any] = {"windows": 8, "window_length": 32, "effort": "fast"}


def run_python(script: str) -> None:
    """Run a script in a process of its own, which has imported nothing yet."""
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_family(tmp_path_factory.mktemp("source") / "llama", "llama"))


@pytest.fixture(scope="module")
def build(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with a checkpoint and an export, made through the face."""
    folder = tmp_path_factory.mktemp("build")
    pipeline.compress(source, folder / "checkpoint", keep_params=0.6, **SMALL)
    pipeline.export(str(folder / "checkpoint"), folder / "onnx", max_length=64)
    return folder


def test_importing_pipeline_and_listing_its_names_imports_nothing_heavy() -> None:
    run_python(
        "import sys, pipeline\n"
        "assert set(pipeline.__all__) <= set(dir(pipeline))\n"
        "from pipeline import compress, export, build_engine, validate\n"
        "assert all(map(callable, (compress, export, build_engine, validate)))\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize(
    "imports",
    [
        "import pipeline, pipeline.compress.methods, pipeline.export.contract",
        "import pipeline.compress.methods\nimport pipeline.export.contract",
        "from pipeline import compress, export\nimport pipeline.compress.methods",
        "from pipeline.compress import methods\nfrom pipeline import compress, export",
    ],
)
def test_stage_and_package_of_one_name_are_the_same_in_any_order(imports: str) -> None:
    run_python(
        f"{imports}\n"
        "import pipeline\n"
        "from pipeline import compress, export\n"
        "from pipeline.compress.methods import METHODS\n"
        "import pipeline.compress.methods as methods, pipeline.export.contract as contract\n"
        "assert methods.METHODS is METHODS is pipeline.compress.methods.METHODS\n"
        "assert contract is pipeline.export.contract\n"
        "assert compress is pipeline.compress and callable(compress)\n"
        "assert export is pipeline.export and callable(export)"
    )


def test_every_name_of_the_face_is_there_and_no_other() -> None:
    for name in pipeline.__all__:
        assert callable(getattr(pipeline, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        pipeline.no_such_name  # noqa: B018


def test_a_build_made_through_the_face_loads_and_answers(build: Path) -> None:
    assert pipeline.load(build / "checkpoint").config.model_type == "llama"
    model = pipeline.LanguageModel.open(build / "onnx")
    assert model.generate("hello", Decoding(4)).new_tokens <= 4


def test_a_request_can_be_given_whole_with_some_of_its_fields_replaced(
    source: str, build: Path, tmp_path: Path
) -> None:
    request = CompressRequest(source, keep_params=0.9, **SMALL)
    report = pipeline.compress(request, tmp_path / "checkpoint", keep_params=0.6)
    assert report["totals"]["kept_fraction"] <= 0.6
    weights = "model.safetensors"
    made, expected = tmp_path / "checkpoint" / weights, build / "checkpoint" / weights
    assert made.read_bytes() == expected.read_bytes()


@pytest.mark.slow
def test_validate_judges_every_stage_of_a_build_and_writes_where_it_is_told(
    build: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"windows": 2, "window_length": 32, "prompts": 1, "max_new_tokens": 4}
    ledger = pipeline.validate(build, tmp_path / "ledger", **how)
    assert not ledger.failures
    assert (tmp_path / "ledger" / "ledger.json").is_file()


def test_a_setting_that_no_request_has_and_an_output_that_exists_are_refused_at_once(
    build: Path, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="keep_everything"):
        pipeline.compress("no-such-model", tmp_path / "small", keep_everything=True)
    with pytest.raises(UsageError, match="exists already"):
        pipeline.compress("no-such-model", build / "checkpoint")
    with pytest.raises(UsageError, match="exists already"):
        pipeline.export("no-such-checkpoint", build / "onnx")
    with pytest.raises(UsageError, match="exists already"):
        pipeline.validate("no-such-build", build)


def test_an_engine_is_refused_for_a_target_that_builds_none(build: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pipeline.build_engine(build / "onnx", tmp_path / "engine", "cpu")
