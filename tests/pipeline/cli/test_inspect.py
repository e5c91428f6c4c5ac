from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli.main import main
from tests.support.families import save_family


def test_a_model_is_shown_with_its_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_family(tmp_path / "model", "smollm")
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "model"
    assert facts["source"] == "folder"
    assert facts["layers"] == 2
    assert facts["groups of a layer"].splitlines() == [
        "q_proj, k_proj, v_proj: 80 x 48",
        "o_proj: 48 x 48",
        "gate_proj, up_proj: 128 x 48",
        "down_proj: 48 x 64",
    ]
    assert main(["inspect", str(folder)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "record", "kind"),
    [
        ("export.json", {"profile": "compat", "opset": 18}, "ONNX folder"),
        ("manifest.json", {"sm": 89, "provenance": {}}, "engine folder"),
        ("build.json", {"request": {}, "stages": {"export": {}}}, "build folder"),
    ],
)
def test_a_folder_is_known_by_its_record(
    file: str,
    record: dict[str, object],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / file).write_text(json.dumps(record))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    record.pop("provenance", None)
    assert facts == {"kind": kind, **record}


@pytest.mark.parametrize("file", ["export.json", "manifest.json", "build.json", "report.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"[1]", b'"text"'])
def test_a_broken_record_is_bad_input_and_named(
    file: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_bytes(content)
    assert main(["inspect", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert "The record" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("file", ["build.json", "report.json"])
def test_a_record_of_another_program_is_bad_input(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text('{"status": "ok"}')
    assert main(["inspect", str(tmp_path)]) == 3
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("what", ["no-such-thing", "."])
def test_what_is_nothing_known_is_bad_input(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", what]) == 3
    assert "error:" in capsys.readouterr().err
