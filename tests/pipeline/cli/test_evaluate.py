from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.main import main
from tests.support.families import tiny_model
from tests.support.tiny_decoder import byte_tokenizer, save_tiny_folder, shared_export

QUESTION = {"question": "Is water wet?", "choices": ["yes", "no, never"], "answer": 0}
TEXT = "The quick brown fox jumps over the lazy dog. " * 8
SMALL = ["--windows", "3", "--window-length", "100"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("evaluate")
    (root / "text.txt").write_text(TEXT)
    (root / "ask.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps(QUESTION) + "\n")
    (root / "broken.jsonl").write_text("{")
    (root / "wrong.jsonl").write_text(json.dumps(QUESTION | {"answer": 2}))
    tiny_model("llama", vocab_size=300).save_pretrained(root / "wider")
    byte_tokenizer().save_pretrained(root / "wider")
    return {
        "torch": str(save_tiny_folder(root / "torch")),
        "other": str(save_tiny_folder(root / "other", seed=1)),
        "onnx": str(shared_export("opset24")),
        "wider": str(root / "wider"),
        "text": str(root / "text.txt"),
        "ask": str(root / "ask.jsonl"),
        "broken": str(root / "broken.jsonl"),
        "wrong": str(root / "wrong.jsonl"),
        "nowhere": str(root / "nowhere"),
    }


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The record that the command prints."""
    assert main(["evaluate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_torch_and_onnx_give_the_same_numbers(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tasks", files["ask"], "--text", files["text"], *SMALL, "-p", "hello"]
    flags += ["--reference", files["other"], "--max-new-tokens", "8"]
    torch, onnx = (
        evaluated(capsys, files[kind], "--backend", kind, *flags) for kind in ("torch", "onnx")
    )
    assert torch["backend"] != onnx["backend"]
    assert torch["tasks"]["scores"] == onnx["tasks"]["scores"]
    assert torch["answers"][0]["text"] == onnx["answers"][0]["text"]
    for key in ("value", "standard_error"):
        assert torch["perplexity"][key] == pytest.approx(onnx["perplexity"][key], rel=1e-4)
    for measure in ("kl", "log_perplexity_change"):
        for key in ("value", "standard_error"):
            expected = torch["reference"][measure][key]
            assert onnx["reference"][measure][key] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_model_is_its_own_perfect_reference(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text", files["text"], *SMALL, "--reference", files["torch"]]
    reference = evaluated(capsys, files["torch"], *flags)["reference"]
    assert reference["kl"]["value"] == pytest.approx(0, abs=1e-12)
    assert reference["top1"] == {"value": 1.0, "standard_error": 0.0}
    assert reference["log_perplexity_change"] == {"value": 0.0, "standard_error": 0.0}


def test_the_table_shows_what_the_output_file_records(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "results.json"
    flags = ["--tasks", files["ask"], "--text", files["text"], *SMALL, "-p", "hello", "--raw"]
    arguments = ["evaluate", files["torch"], *flags, "-o", str(output), "--limit", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    record = json.loads(output.read_text())
    assert record["provenance"]["tool"] == "skipcat"
    assert record["settings"]["windows"] == 3
    assert record["perplexity"]["text"]["details"]["file"] == "text.txt"
    assert len(record["tasks"]["files"]["ask.jsonl"]) == 64
    assert [score["samples"] for score in record["tasks"]["scores"]] == [1, 1]
    assert f"{record['perplexity']['value']:.3f}" in printed
    assert "ask, acc_norm" in printed
    assert "1 questions" in printed
    assert record["answers"][0]["prompt_tokens"] == len("hello")
    assert "> hello" in printed
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_perplexity_needs_no_harness(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    record = evaluated(capsys, files["torch"], "--text", files["text"], *SMALL)
    assert record["perplexity"]["value"] > 1
    assert record["tasks"] is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["{torch}"], 2, "nothing to measure"),
        (["{torch}", "-p", "x", "--reference", "{other}"], 2, "--reference compares"),
        (["{torch}", "--backend", "onnx", "-p", "x"], 2, "cannot read"),
        (["{torch}", "-p", "x", "--workers", "local:2"], 2, "Workers measure windows"),
        (["{torch}", "--text", "{text}", "--window-length", "161"], 2, "longer than the context"),
        (["{torch}", "--text", "{nowhere}"], 3, "no such file"),
        (["{torch}", "--text", "{text}", "--window-length", "150"], 3, "too short"),
        (["{torch}", "--text", "{text}", *SMALL, "--reference", "{wider}"], 3, "272 and 300"),
        (["{nowhere}", "-p", "x"], 3, "Unknown model"),
        (["{torch}", "--tasks", "{nowhere}.jsonl"], 3, "cannot be read"),
        (["{torch}", "--tasks", "{ask},{broken}"], 3, "not JSON"),
        (["{torch}", "--tasks", "{wrong}"], 3, "answer 2"),
        (["{torch}", "--tasks", "{ask},{ask}"], 2, "same name"),
        (["{torch}", "--tasks", "arc_eesy"], 3, "perhaps arc_easy"),
        (["{torch}", "--tasks", "arc_easy"], 3, "allenai/ai2_arc"),
    ],
)
def test_misuse_has_its_status_and_no_traceback(
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    output = tmp_path / "results.json"
    filled = [argument.format(**files) for argument in arguments]
    assert main(["evaluate", *filled, "-o", str(output)]) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    assert not output.exists()
