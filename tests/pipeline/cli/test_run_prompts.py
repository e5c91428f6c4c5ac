"""A file of prompts is answered as its prompts would be, one by one, in its order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.cli.run import _read_prompts
from pipeline.errors import InputError
from tests.support.tiny_decoder import save_tiny_folder, shared_export

PROMPTS = ["hello", "a much longer prompt than the first", "xyz"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "torch": str(save_tiny_folder(root / "torch")),
        "onnx": str(shared_export("opset24")),
    }


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert main(["run", *arguments, "--max-new-tokens", "9", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_side_by_side_is_as_one_by_one(
    kind: str,
    batch_size: str,
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    folder = folders[kind]
    together = run_json(capsys, folder, "--prompts", str(path), "--batch-size", batch_size)
    alone = [run_json(capsys, folder, "-p", prompt)[0] for prompt in PROMPTS]
    assert [answer["text"] for answer in together] == [answer["text"] for answer in alone]
    assert [answer["number"] for answer in together] == [0, 1, 2]


def test_text_answers_are_told_apart(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    assert main(["run", folders["onnx"], "--prompts", str(path), "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert [f"--- {number} ---" in captured.out for number in (1, 2, 3)] == [True] * 3
    assert "3 prompts, 8 at a time" in captured.err


def test_json_lines_hold_prompts_or_conversations(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    path.write_text(json.dumps({"prompt": "Hello."}) + "\n\n" + json.dumps({"messages": chat}))
    assert _read_prompts(path) == [[{"role": "user", "content": "Hello."}], chat]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": "a"}', '{"messages": []}', '{"messages": [{"role": "user"}]}']
)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(InputError) as raised:
        _read_prompts(path)
    assert "line 2" in str(raised.value)


def test_an_empty_file_and_other_flags_are_refused(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    assert main(["run", folders["onnx"], "--prompts", str(path)]) == 3
    assert main(["run", folders["onnx"], "--prompts", str(path), "-p", "abc"]) == 2
    path.write_bytes(b"\xff\xfe\xff")
    assert main(["run", folders["onnx"], "--prompts", str(path)]) == 3
    assert "UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_stop_string_cuts_where_it_begins_as_alone(
    batch_size: str, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    arguments = [folders["onnx"], "--prompts", str(path), "--batch-size", batch_size]
    free = run_json(capsys, *arguments)
    stop = str(free[0]["text"])[2:4]
    stopped = run_json(capsys, *arguments, "--stop", "never there", "--stop", stop)
    assert stopped[0]["text"] == str(free[0]["text"])[: str(free[0]["text"]).index(stop)]
    for prompt, answer in zip(PROMPTS, stopped, strict=True):
        alone = run_json(capsys, folders["onnx"], "-p", prompt, "--stop", stop)[0]
        assert [answer[key] for key in ("text", "prompt_tokens", "new_tokens")] == [
            alone[key] for key in ("text", "prompt_tokens", "new_tokens")
        ]
