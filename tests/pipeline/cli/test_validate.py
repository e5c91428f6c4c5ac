from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from tests.support.ledger_stages import perturb_onnx
from tests.support.tiny_decoder import export_tiny, save_tiny_folder, write_record

SMALL = ["--windows", "3", "--window-length", "64", "--prompts", "2", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with an export and an engine that no machine can run."""
    root = tmp_path_factory.mktemp("build")
    original = save_tiny_folder(root / "original")
    request = CompressRequest(
        str(original), keep_params=0.7, windows=8, window_length=32, dtype="float32"
    )
    compress_to_folder(request, root / "checkpoint")
    export_tiny(root / "checkpoint", root / "onnx", "compat")
    (root / "engine").mkdir()
    (root / "engine" / "manifest.json").write_text("{}")
    return root


def test_a_sound_build_passes_and_leaves_its_reports(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(build), *SMALL]) == 0
    output = capsys.readouterr().out
    ledger = json.loads((build / "ledger" / "ledger.json").read_text())
    assert {row["name"]: row["verdict"]["status"] for row in ledger["rows"]} == {
        "original": "measured",
        "compressed, dense product": "measured",
        "compressed, skip form": "pass",
        "onnxruntime onnx": "pass",
        "tensorrt engine": "not run",
    }
    assert ledger["inputs"]["text"]["source"] == "self"
    page = (build / "ledger" / "ledger.html").read_text()
    for row in ledger["rows"]:
        assert row["name"] in output
        assert row["name"] in page
    assert main(["validate", str(build), *SMALL]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_wrong_export_exits_with_5_after_reporting(
    build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = shutil.copytree(build / "onnx", tmp_path / "wrong")
    perturb_onnx(wrong)
    write_record(wrong, "compat")
    reports = tmp_path / "reports"
    arguments = ["validate", str(build), "--onnx", str(wrong), "-o", str(reports), "--json"]
    assert main([*arguments, *SMALL]) == 5
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed == json.loads((reports / "ledger.json").read_text())
    assert not printed["passed"]
    assert printed["rows"][3]["verdict"]["status"] == "fail"
    assert "onnxruntime wrong" in captured.err
    assert (reports / "ledger.html").is_file()


def test_dry_run_lists_the_stages_and_writes_nothing(
    build: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "reports"
    assert main(["validate", str(build), "--dry-run", "-o", str(output)]) == 0
    assert "onnxruntime onnx: against compressed, skip form" in capsys.readouterr().out
    assert not output.exists()


@pytest.mark.parametrize(
    ("extra", "status", "message"),
    [
        (["--window-length", "161"], 2, "--window-length"),
        (["--text", "/nowhere.txt"], 3, "cannot be read"),
        (["--original", "/nowhere/model"], 3, "Unknown model"),
    ],
)
def test_bad_inputs_are_refused(
    build: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    status: int,
    message: str,
) -> None:
    assert main(["validate", str(build), "-o", str(tmp_path / "x"), *SMALL, *extra]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_nothing_to_compare_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate"]) == 2
    assert "--checkpoint" in capsys.readouterr().err
