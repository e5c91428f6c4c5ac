"""Children that answer in lines of JSON, that run to their end, and all the ways they can fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.child_process import (
    Beside,
    ChildEnd,
    ChildEndedError,
    JsonChild,
    environment,
    run_to_end,
)

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"heard": json.loads(line)}), flush=True)
"""
# Libraries print where they please: none of it may come between the answers.
NOISY = """
import os, sys
from pipeline.child_process import answers_on_stdout
tell = answers_on_stdout()
print("noise of Python", flush=True)
os.write(1, b"noise of a library\\n")
for line in sys.stdin:
    tell({"lines": 1})
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_no_module_of_the_current_folder_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a downloaded model's."""
    for name in ("json", "numpy", "pipeline"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    for path in ("", os.pathsep, f"{os.pathsep}/nowhere"):
        monkeypatch.setenv("PYTHONPATH", path)
        with JsonChild([sys.executable, "-m", "pipeline.bench.child"]) as child:
            target = {"kind": "folder", "folder": "/nowhere", "library": "onnxruntime"}
            assert "error" in child.ask(**target, device="cpu", threads=1)
        command = [sys.executable, "-m", "pipeline.engine.worker", "no-such-request.json"]
        assert run_to_end(command, tmp_path / "log", 60).status != 0
        assert "no-such-request.json" in (tmp_path / "log").read_text()
    assert not (tmp_path / "ran").exists()


def test_requests_are_answered_in_their_order() -> None:
    with JsonChild(python(ECHO)) as child:
        assert child.ask(text="größer\n", numbers=[1, 2.5]) == {
            "heard": {"text": "größer\n", "numbers": [1, 2.5]}
        }
        child.send({"first": None})
        child.send({"second": None})
        assert child.hear() == {"heard": {"first": None}}
        assert child.hear() == {"heard": {"second": None}}
        assert child.close() == 0


def test_what_a_child_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with JsonChild(python(NOISY)) as child:
        assert child.ask() == {"lines": 1}
    assert capfd.readouterr().err == "noise of Python\nnoise of a library\n"


def test_a_child_that_ends_is_reported_with_its_status() -> None:
    with JsonChild(python("import sys; sys.exit(7)")) as child:
        with pytest.raises(ChildEndedError, match="status 7") as ended:
            child.hear()
        assert ended.value.status == 7
        with pytest.raises(ChildEndedError, match="status 7"):
            child.ask(anything=1)


def test_a_child_that_a_signal_ends_is_reported_with_the_signal() -> None:
    with JsonChild(python("import os; os.abort()")) as child:
        with pytest.raises(ChildEndedError, match="signal 6") as ended:
            child.hear()
        assert ended.value.status == -signal.SIGABRT


def test_a_failure_of_the_parent_ends_the_child_at_once() -> None:
    child = JsonChild(python("import time; time.sleep(60)"))
    with pytest.raises(ValueError, match="a defect"), child:
        raise ValueError("a defect")
    assert child.close() == -signal.SIGKILL


def test_a_child_that_does_not_end_by_itself_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.child_process._SECONDS_TO_END", 0.1)
    assert JsonChild(python("import time; time.sleep(60)")).close() == -signal.SIGKILL


def test_a_session_of_its_own_keeps_ctrl_c_from_a_child() -> None:
    tell_session = "import os, json; print(json.dumps({'session': os.getsid(0)}), flush=True)"
    with JsonChild(python(tell_session), own_session=True) as child:
        assert child.hear() == {"session": child.pid}
    with JsonChild(python(tell_session)) as child:
        assert child.hear() == {"session": os.getsid(0)}


def test_a_child_imports_this_checkout_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    here = str(Path(__file__).resolve().parents[2])
    changed = environment(HF_HUB_OFFLINE="yes")
    assert changed["PYTHONPATH"] == f"{here}{os.pathsep}/elsewhere"
    assert changed["HF_HUB_OFFLINE"] == "yes"
    assert os.environ["PYTHONPATH"] == "/elsewhere"


def test_a_run_to_the_end_keeps_both_outputs_and_gives_the_status(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, sys; os.write(1, b'out '); os.write(2, b'err'); sys.exit(3)"
    assert run_to_end(python(code), log, 30) == ChildEnd(3, timed_out=False)
    assert log.read_text() == "out err"
    killed = run_to_end(python("import os; os.kill(os.getpid(), 9)"), log, 30)
    assert killed == ChildEnd(-signal.SIGKILL, timed_out=False)


def test_a_run_beyond_its_time_is_killed(tmp_path: Path) -> None:
    end = run_to_end(python("import time; time.sleep(60)"), tmp_path / "log", 0.2)
    assert end == ChildEnd(-signal.SIGKILL, timed_out=True)


def test_ctrl_c_kills_the_worker(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from pipeline.child_process import run_to_end\n"
        # A job started in the background by a script inherits an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run_to_end([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); "
        "time.sleep(60)'], Path(sys.argv[1]), 60)"
    )
    log = tmp_path / "build.log"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(log)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stderr=subprocess.DEVNULL,
    )
    try:
        worker = wait_for_number(log)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(20) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    finally:
        parent.kill()


def wait_for_number(path: Path) -> int:
    for _ in range(200):
        text = path.read_text() if path.exists() else ""
        if text.endswith("\n"):
            return int(text)
        time.sleep(0.1)
    pytest.fail("the worker did not start")


def test_commands_beside_run_in_their_order_and_what_they_say_is_kept() -> None:
    with Beside() as beside:
        ends = [beside.add("no-such-command"), beside.add("--version")]
        refused, printed = (end.result() for end in ends)
    assert (refused.status, printed.status) == (2, 0)
    assert "no-such-command" in refused.said
    assert printed.said == ""
    assert 0 < printed.seconds < 60


def test_what_still_runs_beside_is_ended_and_what_waits_is_never_begun() -> None:
    with Beside() as beside:
        ends = [beside.add("doctor"), beside.add("--version")]
    assert ends[0].result().status != 0
    assert ends[1].cancelled() or ends[1].result().status == -signal.SIGINT
