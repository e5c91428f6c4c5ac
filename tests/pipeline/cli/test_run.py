from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipeline.cli.main import main
from tests.support.tiny_decoder import save_tiny_folder, shared_export


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "torch": str(save_tiny_folder(root / "torch")),
        "onnx": str(shared_export("opset24")),
    }


def test_torch_and_onnx_answer_alike(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for backend, folder in folders.items():
        arguments = ["run", folder, "-p", "hello", "--max-new-tokens", "12", "--json"]
        assert main([*arguments, "--backend", backend]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["backend"] != answers[1]["backend"]
    assert answers[0]["text"] == answers[1]["text"]
    assert answers[0]["new_tokens"] == 12


def test_the_answer_goes_to_stdout_and_the_speed_to_stderr(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", folders["onnx"], "-p", "hello", "--max-new-tokens", "5"]
    assert main([*arguments, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert "tokens/s" in captured.err
    assert "--max-new-tokens" in captured.err


def test_a_prompt_from_stdin_equals_one_from_a_flag(
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["run", folders["onnx"], "--raw", "--max-new-tokens", "5"]
    assert main([*arguments, "-p", "abc"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert main(arguments) == 0
    assert capsys.readouterr().out == expected


def test_the_chat_template_and_the_system_message_reach_the_model(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = []
    for extra in (["--raw"], [], ["--system", "S"]):
        assert main(["run", folders["onnx"], "-p", "abc", "--json", *extra]) == 0
        lengths.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    chat = len("<user>abc\n<assistant>")
    assert lengths == [len("abc"), chat, chat + len("<system>S\n")]


def test_a_conversation_remembers(
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("a\n\nb\n"))
    assert main(["run", folders["onnx"], "--max-new-tokens", "3"]) == 0
    speeds = [line for line in capsys.readouterr().err.splitlines() if "tokens," in line]
    first, second = (int(line.split(": ")[1].split(" ")[0]) for line in speeds)
    assert first == len("<user>a\n<assistant>")
    assert second > 2 * first - len("<assistant>")


@pytest.mark.parametrize(
    ("extra", "status", "message"),
    [
        (["--backend", "torch"], 2, "--backend onnx"),
        (["--raw", "--system", "S"], 2, "--system needs"),
        (["--temperature", "-1"], 2, "temperature is out of range"),
        (["-p", ""], 3, ""),
    ],
)
def test_misuse_has_its_status_and_its_remedy(
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    status: int,
    message: str,
) -> None:
    prompt = ["-p", "abc", "--raw"] if "-p" not in extra else ["--raw"]
    prompt = ["-p", "abc"] if "--system" in extra else prompt
    assert main(["run", folders["onnx"], *prompt, *extra]) == status
    assert message in capsys.readouterr().err


def test_a_build_folder_is_refused_with_the_folder_to_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_folder(tmp_path / "checkpoint")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert main(["run", str(tmp_path), "-p", "abc"]) == 3
    assert main(["run", str(tmp_path / "nothing"), "-p", "abc"]) == 2
    capsys.readouterr()


def test_stop_strings_end_the_answer(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", folders["onnx"], "-p", "hello", "--max-new-tokens", "30", "--json"]
    assert main(arguments) == 0
    free = json.loads(capsys.readouterr().out)["text"]
    stop = free[len(free) // 2 :][:2]
    assert main([*arguments, "--stop", "never there", "--stop", stop]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["text"] == free[: free.index(stop)]
    assert stopped["ended"] == "stop"


def test_a_gpu_that_is_not_there_is_said_and_no_cpu_takes_its_place(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["run", folders["torch"], "-p", "abc", "--device", "cuda"]) == 3
    captured = capsys.readouterr()
    assert "PyTorch sees no NVIDIA GPU" in captured.err
    assert captured.out == ""


def test_only_a_checkpoint_goes_to_the_gpu(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", folders["onnx"], "-p", "abc", "--device", "cuda"]) == 2
    assert "for a checkpoint" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_compressed_checkpoint_answers_on_the_gpu_as_on_the_cpu(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = str(tmp_path / "small")
    compress = ["compress", "-m", folders["torch"], "-o", small, "--method", "skipcat"]
    assert main([*compress, "--keep-params", "0.7", "--windows", "4", "--window-length", "32"]) == 0
    capsys.readouterr()
    answers = []
    for device in ("cpu", "cuda"):
        arguments = ["run", small, "-p", "hello", "--max-new-tokens", "12", "--json"]
        assert main([*arguments, "--device", device]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert "block-skip kernels" in answers[1]["backend"]
    assert answers[0]["text"] == answers[1]["text"]


@pytest.mark.parametrize("flags", [["-p", "a\udcff"], ["-p", "a", "--stop", "\udcff"]])
def test_bytes_that_are_no_text_are_named(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(["run", folders["onnx"], *flags]) == 3
    captured = capsys.readouterr().err
    assert "byte 0xff at" in captured
    assert "Traceback" not in captured


def test_stdin_that_is_no_text_is_named_and_a_byte_order_mark_passed_over(
    folders: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["run", folders["onnx"], "--raw", "--json", "--max-new-tokens", "2"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(arguments) == 3
    assert "byte 0xff at 2" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfabc")))
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 3
