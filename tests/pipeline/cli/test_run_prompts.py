"""A file of prompts is answered as its prompts would be, one by one, in its order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.main import main
from pipeline.cli.run_prompts import _read_prompts
from pipeline.errors import InputError
from pipeline.runtime.draft_model import open_drafted
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.tokenizer import load_tokenizer
from tests.support.tiny_decoder import save_tiny_folder, shared_draft, shared_export

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


SAMPLED = ("--temperature", "1.3", "--top-k", "30", "--seed", "7")


@pytest.mark.parametrize(
    "options",
    [
        (),
        SAMPLED,
        (*SAMPLED, "--raw"),
        ("--system", "Be brief."),
        ("--raw", "--stop", "a", "--stop", "e"),
        ("--repetition-penalty", "1.4", "--max-new-tokens", "40"),
        ("--raw", "--max-new-tokens", "1000"),
    ],
)
def test_every_option_means_what_it_does_for_one_prompt(
    options: tuple[str, ...],
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "prompts.txt"
    asked = ["  blanks stay  ", "hello", "<s>special</s>", "hello"]
    path.write_bytes("\n".join(asked).encode())
    together = run_json(capsys, folders["onnx"], "--prompts", str(path), *options)
    fields = ("schema", "backend", "text", "prompt_tokens", "new_tokens", "ended")
    for prompt, answer in zip(asked, together, strict=True):
        alone = run_json(capsys, folders["onnx"], "-p", prompt, "--no-lookup", *options)[0]
        assert [answer[name] for name in fields] == [alone[name] for name in fields]


def test_a_line_with_a_system_message_keeps_it(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [{"role": "system", "content": "SS"}, {"role": "user", "content": "hi"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": own}) + "\n" + json.dumps({"messages": own[1:]}))
    answers = run_json(capsys, folders["onnx"], "--prompts", str(path), "--system", "SSSS")
    chat = len("<user>hi\n<assistant>")
    assert [a["prompt_tokens"] for a in answers] == [
        chat + len("<system>SS\n"),
        chat + len("<system>SSSS\n"),
    ]


def test_a_prompt_that_cannot_be_answered_costs_no_other_its_answer(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    asked = ["hello", "x" * 400, "", "xyz"]
    path.write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in asked))
    arguments = ["run", folders["onnx"], "--prompts", str(path), "--raw", "--max-new-tokens", "4"]
    assert main([*arguments, "--json"]) == 3
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["number"] for record in records] == [0, 1, 2, 3]
    assert ["text" in record for record in records] == [True, False, False, True]
    assert [record["line"] for record in records] == [1, 3, 5, 7]
    assert "400 tokens" in records[1]["observed"]
    assert f"{path}, line 3" in captured.err
    assert "2 of 4 prompts were not answered" in captured.err
    assert main(arguments) == 3
    assert capsys.readouterr().out.count("---\n") == 4


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    inside = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    path.write_bytes(f"\ufeff{inside}\r\n \r\nsecond \n".encode())
    assert [messages[0]["content"] for messages in _read_prompts(path)] == [inside, "second "]
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": inside}, ensure_ascii=False), '{"prompt": "b"}']
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert [messages[0]["content"] for messages in _read_prompts(path)] == [inside, "b"]


@pytest.mark.parametrize(
    "line",
    [b'{"prompt": "\\ud83d"}', b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}", b'"\xff"'],
)
def test_text_that_is_none_is_named_by_its_line(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n' + line)
    with pytest.raises(InputError, match="line 2"):
        _read_prompts(path)


def test_answers_are_printed_as_they_come(
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fails later leaves what was answered before."""
    from pipeline.runtime.sessions import onnx_session

    path = tmp_path / "prompts.txt"
    path.write_text("hello\nstop here\n")
    prefills = []
    forward = onnx_session.OnnxSession.forward

    def failing(self: object, input_ids: np.ndarray, last_only: bool = False) -> np.ndarray:
        prefills.extend([input_ids] if input_ids.shape[1] > 1 else [])
        if len(prefills) > 1:
            raise RuntimeError("power cut")
        return forward(self, input_ids, last_only)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx_session.OnnxSession, "forward", failing)
    arguments = ["run", folders["onnx"], "--prompts", str(path), "--batch-size", "1"]
    assert main([*arguments, "--max-new-tokens", "3"]) == 1
    assert capsys.readouterr().out.startswith("--- 1 ---\n")


def test_drafts_of_another_export_change_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    drafted = [str(shared_export("cpu")), "--draft", str(shared_draft()), "--no-lookup"]
    together = run_json(capsys, *drafted, "--prompts", str(path))
    alone = [run_json(capsys, *drafted, "-p", prompt)[0] for prompt in PROMPTS]
    assert [answer["text"] for answer in together] == [answer["text"] for answer in alone]
    session, _ = open_drafted(shared_export("cpu"), shared_draft(), length=0)
    model = LanguageModel(session, load_tokenizer(shared_export("cpu")), drafter=None)
    messages = [{"role": "user", "content": PROMPTS[1]}]
    assert model.chat(messages, Decoding(9)).text == alone[1]["text"]


def test_a_draft_that_cannot_pay_is_left_out_and_that_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, draft = str(shared_draft()), str(shared_export("cpu"))
    asked = ["-p", "hello", "--max-new-tokens", "9", "--no-lookup"]
    assert main(["run", folder, "--draft", draft, *asked]) == 0
    found = capsys.readouterr()
    assert "cannot pay for itself" in " ".join(found.err.split())
    assert main(["run", folder, *asked]) == 0
    assert capsys.readouterr().out == found.out
