"""A command that needs an optional package names the extra that brings it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.engine import target
from pipeline.gpu import ORIN, Gpu
from tests.support.families import save_family
from tests.support.tiny_decoder import byte_tokenizer
from tests.support.tiny_graph import write_export

GPU = target._Host(Gpu("a Jetson Orin", ORIN), has_standard=False)


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("onnxruntime", "cpu", ["run", "{onnx}", "-p", "hello"]),
        ("tensorrt_rtx", "rtx", ["engine", "{onnx}", "-o", "{output}", "--target", "sm86"]),
        ("tensorrt_rtx", "rtx", ["build", "-m", "{model}", "-o", "{output}", "--target", "sm86"]),
        ("tensorrt", "trt", ["engine", "{onnx}", "-o", "{output}", "--target", "orin"]),
        ("tensorrt", "trt", ["build", "-m", "{model}", "-o", "{output}", "--target", "tensorrt"]),
        ("lm_eval", "eval", ["evaluate", "{model}", "--tasks", "q.jsonl", "-o", "{output}"]),
        (
            "datasets",
            "hub",
            [
                *("compress", "-m", "{model}", "-o", "{output}"),
                *("--calibration", "c4", "--window-length", "32"),
            ],
        ),
    ],
)
def test_a_missing_package_is_named_with_its_extra_and_status_3(
    module: str,
    extra: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = {name: str(tmp_path / name) for name in ("onnx", "model", "output")}
    byte_tokenizer().save_pretrained(write_export(tmp_path / "onnx"))
    save_family(tmp_path / "model", "llama")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(target, "_look", lambda: GPU)
    assert main([argument.format(**folders) for argument in arguments]) == 3
    message = capsys.readouterr().err
    assert f"EXTRAS={extra}" in message
    assert f"skipcat[{extra}]" in message
    assert "Traceback" not in message
    assert not (tmp_path / "output").exists()
