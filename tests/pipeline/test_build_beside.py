"""What a build makes in processes beside its own has the same bytes, and the same errors."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pipeline import build
from pipeline.child_process import Beside, EndBeside
from pipeline.cli.main import main
from pipeline.errors import InputError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from tests.support.tiny_build import build_arguments


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A build of a tiny model for the CPU, but for its output."""
    return build_arguments(tmp_path_factory.mktemp("inputs"))


def changed(arguments: list[str], flag: str, *others: str) -> list[str]:
    """The same with others in place of a flag and its value."""
    place = arguments.index(flag)
    return [*arguments[:place], *others, *arguments[place + 2 :]]


def stages_of(folder: Path) -> list[str]:
    return list(json.loads((folder / "build.json").read_text())["stages"])


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tiny model pay for a process, and a machine have two cores."""
    monkeypatch.setattr(build, "_LAYERS_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(build, "product_threads", lambda: 2)


@pytest.mark.slow
@pytest.mark.usefixtures("beside")
def test_an_export_made_beside_another_has_the_bytes_of_one_made_alone(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = changed(arguments, "--keep-params", "--memory", "60KB")
    assert main([*small, "-o", str(tmp_path / "built")]) == 0
    assert "export cpu, in a process beside this one" in capfd.readouterr().err
    assert stages_of(tmp_path / "built") == ["compress", "export float32", "export cpu", "validate"]
    alone = ExportRequest("cpu", "float32", max_length=128)
    export_folder(tmp_path / "built" / "checkpoint", tmp_path / "alone", alone)
    for name in ("model.onnx", "model.onnx.data"):
        own, beside = tmp_path / "alone" / name, tmp_path / "built" / "onnx-cpu" / name
        assert own.read_bytes() == beside.read_bytes()


class FailsBeside(Beside):
    """Every command fails."""

    def add(self, *arguments: str) -> Future[EndBeside]:
        end: Future[EndBeside] = Future()
        end.set_result(EndBeside(1, "", 0.0))
        return end


@pytest.mark.usefixtures("beside")
def test_an_engine_that_cannot_be_built_beside_ends_the_build_before_its_ledger(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise InputError("The engine cannot be built.")

    monkeypatch.setattr(build, "Beside", FailsBeside)
    monkeypatch.setattr("pipeline.engine.build.build_engine", refuse)
    command = changed(arguments, "--target", "--target", "sm86")
    assert main([*command, "-o", str(tmp_path / "built")]) == 3
    told = capsys.readouterr().err
    assert "export float16 failed in a process of its own" in told
    assert "The engine cannot be built." in told
    assert stages_of(tmp_path / "built") == ["compress", "export float32", "export float16"]
    assert not (tmp_path / "built" / "ledger").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("beside")
def test_an_engine_is_built_beside_the_ledger_that_has_its_row(
    arguments: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    command = changed(arguments, "--target", "--target", "sm86")
    assert main([*command, "-o", str(tmp_path / "built")]) == 0
    ledger = json.loads((tmp_path / "built" / "ledger" / "ledger.json").read_text())
    assert ledger["rows"][-1]["name"] == "tensorrt engine-rtx-sm86"
    assert "no NVIDIA GPU" in str(ledger["rows"][-1]["verdict"])
    assert (tmp_path / "built" / "engine-rtx-sm86" / "manifest.json").exists()
