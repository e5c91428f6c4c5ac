from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from pipeline.cli.main import main
from pipeline.cli.serve import _read_keys
from tests.support.tiny_decoder import save_tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_the_command_serves_until_a_signal_and_then_ends_in_order(
    folder: Path, number: signal.Signals, status: int
) -> None:
    arguments = ["serve", str(folder), "--port", "0", "--slots", "2", "--grace-s", "5"]
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.main", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        assert child.stderr is not None
        found = None
        for line in child.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+/v1", line):
                break
        assert found
        client = openai.OpenAI(base_url=found[0], api_key="none", max_retries=0)
        stream = client.completions.create(
            model="tiny", prompt="abc", max_tokens=100, temperature=0, stream=True
        )
        next(stream)
        child.send_signal(number)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        rest = child.stderr.read()
        assert child.wait(20) == status
        assert "Traceback" not in rest
        assert rest.strip() == "stopped"
    finally:
        child.kill()
        child.wait()


def test_a_port_in_use_is_told_before_the_model_loads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    message = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in message
    assert "--port" in message


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--host", "no.such.host.invalid"], 2, "--host"),
        (["--slots", "0"], 2, "--slots"),
        (["--client-timeout-s", "0"], 2, "--client-timeout-s"),
        (["--api-key-file", "/nowhere"], 2, "does not exist"),
        (["--allowed-host", "http://models.lan"], 2, "models.lan"),
        (["--cors-origin", "app.example"], 2, "scheme://name"),
        (["--backend", "onnx", "--port", "0"], 2, "--backend torch"),
    ],
)
def test_misuse_has_its_status_and_its_remedy(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    assert main(["serve", str(folder), *arguments]) == status
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path), "--port", "0"]) == 3
    assert "neither an ONNX export nor a checkpoint" in capsys.readouterr().err


def test_keys_are_lines_and_there_must_be_one(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n", encoding="utf-8")
    assert _read_keys(path) == ("one", "two")
    path.write_bytes(b"\xef\xbb\xbfsk-1\r\n# of the laptop\r\nsk-2")
    assert _read_keys(path) == ("sk-1", "sk-2")
    path.write_text("\n \n", encoding="utf-8")
    assert main(["serve", str(folder), "--api-key-file", str(path)]) == 2
    assert "holds no key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("one\nключ\n".encode(), ":2"),
        (b"two words\n", ":1"),
        ("a\u2028b".encode(), ":1"),
        (b"\xff", "key"),
    ],
)
def test_keys_that_no_client_can_send_are_refused_unshown(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    place: str,
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    assert main(["serve", str(folder), "--api-key-file", str(path)]) == 2
    message = capsys.readouterr().err
    assert place in message
    assert "ключ" not in message
    assert "words" not in message


def test_a_missing_package_is_named_with_its_extra(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name)
    )
    assert main(["serve", str(folder)]) == 3
    assert "skipcat[serve]" in capsys.readouterr().err


def test_another_host_than_this_machine_is_warned_about(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.runtime.sessions.slots import open_slots
    from pipeline.serve.server import ServeRequest, _announce, _listen

    session = open_slots(folder)
    for host, warned in (("127.0.0.1", False), ("0.0.0.0", True)):
        with _listen(host, 0) as listener:
            _announce(ServeRequest(folder=folder, host=host), session, listener)
        assert ("warning: " in capsys.readouterr().err) == warned
