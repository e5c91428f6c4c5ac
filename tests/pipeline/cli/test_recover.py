from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import training_state
from pipeline.cli.main import main
from pipeline.model import load
from pipeline.output import partial_path
from pipeline.recover import losses
from tests.support.interrupted import broken_at
from tests.support.tiny_recovery import save_small, write_train_text

SETTINGS = ["--steps", "12", "--lora-rank", "4", "--window-length", "32"]
SETTINGS += ["--learning-rate", "1e-2"]


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def train_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_train_text(tmp_path_factory.mktemp("text") / "train.txt")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "better"


@pytest.fixture
def arguments(small: Path, train_text: str, output: Path) -> list[str]:
    return ["recover", str(small), "-o", str(output), "--text", train_text, *SETTINGS]


@pytest.fixture(scope="module")
def recovered(small: Path, train_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nothing disturbed; not to be written to."""
    folder = tmp_path_factory.mktemp("recovered") / "better"
    arguments = ["recover", str(small), "-o", str(folder), "--text", train_text, *SETTINGS]
    assert main(arguments) == 0
    return folder


@pytest.fixture
def interrupted(
    arguments: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """The output of a run that Ctrl-C stopped in its eighth step."""
    with monkeypatch.context() as patch:
        patch.setattr(training_state, "_SECONDS_BETWEEN_SAVES", 0.0)
        patch.setattr(losses, "_next_token_loss", broken_at(9, losses._next_token_loss))
        assert main(arguments) == 130
    assert "a recover" in capsys.readouterr().err
    assert not output.exists()
    return output


def test_a_recovered_checkpoint_is_written_whole(small: Path, recovered: Path) -> None:
    written = {path.name for path in recovered.iterdir()}
    assert written == {path.name for path in small.iterdir()} | {"recovery.json"}
    assert [path.name for path in recovered.parent.iterdir()] == [recovered.name]
    assert weights_hash(recovered) != weights_hash(small)


def test_the_same_command_writes_the_same_bytes_and_prints_json(
    arguments: list[str], recovered: Path, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record == json.loads((output / "recipe.json").read_text())["recovery"]
    assert weights_hash(output) == weights_hash(recovered)


def test_what_was_won_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "cross entropy of the next token" in printed
    assert "windows held out" in printed


def test_inspect_shows_what_was_won(recovered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(recovered), "--json"]) == 0
    assert '"next_token"' in capsys.readouterr().out


def test_an_interrupted_run_resumes_to_the_same_bytes(
    arguments: list[str], interrupted: Path, recovered: Path
) -> None:
    assert (partial_path(interrupted) / "training" / "state.safetensors").exists()
    assert main([*arguments, "--resume"]) == 0
    assert weights_hash(interrupted) == weights_hash(recovered)
    for name in ("recovery.json", "report.json", "README.md"):
        assert (interrupted / name).read_bytes() == (recovered / name).read_bytes()
    assert [path.name for path in interrupted.parent.iterdir()] == [interrupted.name]


def test_without_resume_an_unfinished_run_is_discarded_with_a_note(
    arguments: list[str],
    interrupted: Path,
    recovered: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == 0
    assert "is discarded" in capsys.readouterr().err
    assert weights_hash(interrupted) == weights_hash(recovered)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--seed", "1"], "seed"),
        (["--lora-rank", "5"], "lora_rank"),
        (["--steps", "11"], "steps"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(
    changed: list[str],
    named: str,
    arguments: list[str],
    interrupted: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments, *changed, "--resume"]) == 3
    assert f"differs in {named}" in capsys.readouterr().err
    assert (partial_path(interrupted) / "training" / "state.safetensors").exists()


def test_a_run_is_not_resumed_on_another_text_or_other_weights(
    arguments: list[str],
    interrupted: Path,
    train_text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = Path(train_text).read_text()
    Path(train_text).write_text(text[::-1])
    try:
        assert main([*arguments, "--resume"]) == 3
    finally:
        Path(train_text).write_text(text)
    assert "differs in text_sha256" in capsys.readouterr().err


def test_a_diverging_run_names_its_step_and_goes_on_with_a_smaller_learning_rate(
    arguments: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training_state, "_SECONDS_BETWEEN_SAVES", 0.0)
    # An update this large overflows the products of the next step.
    assert main([*arguments, "--learning-rate", "1e30"]) == 3
    message = capsys.readouterr().err
    assert "Training diverged" in message
    assert "step 2" in message
    assert "smaller --learning-rate, with --resume" in message
    assert "Traceback" not in message
    assert not output.exists()
    assert main([*arguments, "--learning-rate", "1e-3", "--resume"]) == 0
    recovery = json.loads((output / "recipe.json").read_text())["recovery"]
    assert recovery["learning_rates"] == {"0": 1e-3}
    assert recovery["loss"]["next_token"]["after"] < recovery["loss"]["next_token"]["before"]


def test_a_text_that_is_too_short_says_how_many_tokens_are_needed(
    arguments: list[str],
    train_text: str,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(load, "AutoModelForCausalLM", None)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    arguments[arguments.index(train_text)] = str(short)
    assert main(arguments) == 3
    # 12 steps of 4 windows and a tenth held out: 54 windows of 32 tokens.
    assert "at least 1728 tokens" in capsys.readouterr().err
    assert not partial_path(output).exists()
    assert main([*arguments, "--windows", "5"]) == 3
    assert "at least 160 tokens" in capsys.readouterr().err


def test_few_windows_may_be_read_again(arguments: list[str], train_text: str, output: Path) -> None:
    assert main([*arguments, "--windows", "5"]) == 0
    recovery = json.loads((output / "recipe.json").read_text())["recovery"]
    assert (recovery["text"]["windows"], recovery["held_out_windows"]) == (5, 1)


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        (["--steps", "0"], 2, "--steps"),
        (["--text", "self"], 2, "pass --teacher"),
        (["--window-length", "257"], 2, "at most 256"),
        (["--text", "no-such-file"], 3, "cannot be read"),
        (["--teacher", "no-such-model"], 3, "no-such-model"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(
    changed: list[str],
    status: int,
    message: str,
    arguments: list[str],
    output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments, *changed]) == status
    assert message in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


def test_a_folder_that_is_no_checkpoint_is_refused(
    tmp_path: Path, train_text: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recover", str(tmp_path), "-o", str(output), "--text", train_text, *SETTINGS]
    assert main(arguments) == 3
    assert "config.json" in capsys.readouterr().err


def test_an_existing_output_is_refused_before_anything_is_loaded(
    recovered: Path, train_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["recover", "nowhere", "-o", str(recovered), "--text", train_text, *SETTINGS]
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_without_peft_the_extra_is_named_and_nothing_is_written(
    arguments: list[str],
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(arguments) == 3
    message = capsys.readouterr().err
    assert "EXTRAS=recover" in message
    assert "skipcat[recover]" in message
    assert list(output.parent.iterdir()) == []


def test_a_killed_process_is_resumed_to_the_same_bytes(
    small: Path, train_text: str, tmp_path: Path
) -> None:
    """No chance to clean up, and nothing carried over but the files."""
    settings = [*SETTINGS, "--steps", "40"]
    folders = [tmp_path / "killed", tmp_path / "whole"]
    commands = [
        ["recover", str(small), "-o", str(folder), "--text", train_text, *settings]
        for folder in folders
    ]
    script = (
        "from pipeline import training_state; training_state._SECONDS_BETWEEN_SAVES = 0.0\n"
        f"from pipeline.cli.main import main; main({commands[0]!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    state = partial_path(folders[0]) / "training" / "state.safetensors"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert state.exists(), "the process ended before it could be killed"
    assert main([*commands[0], "--resume"]) == 0
    assert main(commands[1]) == 0
    assert weights_hash(folders[0]) == weights_hash(folders[1])
    shutil.rmtree(folders[0])
