from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import setup_environment as setup

VERBS = setup.VERBS
NO_GPU = (False, "nvidia-smi is not installed")
GPU = (True, "nvidia-smi lists GPU 0: NVIDIA H200")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose .venv holds an interpreter and no stamp."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    python = setup.venv_python(tmp_path)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    return tmp_path


@pytest.fixture
def commands(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands a set-up of `project` would run, on a machine without a GPU or a network."""
    seen: list[list[str]] = []

    def record(what: str, command: Sequence[str], *, verbose: bool) -> None:
        seen.append(list(command))

    monkeypatch.setattr(setup, "run_step", record)
    monkeypatch.setattr(setup, "probe_gpu", lambda: NO_GPU)
    monkeypatch.setattr(setup, "reason_to_replace", lambda *_: None)
    monkeypatch.setattr(setup, "choose_torch", lambda *_: ([setup.TORCH], "a test"))
    return seen


@pytest.mark.parametrize(
    ("gpu", "jetson", "system", "requested", "expected"),
    [
        (NO_GPU, False, "Linux", (), ("cpu", "rtx", *VERBS)),
        (GPU, False, "Linux", (), ("gpu", "trt", *VERBS)),
        (GPU, True, "Linux", (), ("cpu", *VERBS)),
        (NO_GPU, False, "Darwin", (), ("cpu", *VERBS)),
        (NO_GPU, False, "Linux", ("hub",), ("cpu", "rtx", *VERBS, "hub")),
        (GPU, False, "Linux", ("gpu",), (*VERBS, "gpu")),
        (NO_GPU, False, "Linux", ("gpu", "trt"), (*VERBS, "gpu", "trt")),
    ],
)
def test_extras_follow_the_machine(
    gpu: tuple[bool, str],
    jetson: bool,
    system: str,
    requested: tuple[str, ...],
    expected: tuple[str, ...],
) -> None:
    choice = setup.choose_packages(gpu=gpu, jetson=jetson, system=system, requested=requested)
    assert choice.extras == expected
    assert choice.reason


def test_only_a_jetson_sees_the_system_packages() -> None:
    assert setup.choose_packages(gpu=GPU, jetson=True, system="Linux").system_site_packages
    assert not setup.choose_packages(gpu=GPU, jetson=False, system="Linux").system_site_packages


def test_torch_comes_from_the_cpu_index_only_where_it_answers() -> None:
    arguments, _ = setup.choose_torch(["cpu"], "Linux", lambda _: (True, "it answers"))
    assert arguments == [setup.TORCH, "--extra-index-url", setup.TORCH_CPU_INDEX]
    arguments, reason = setup.choose_torch(["cpu"], "Linux", lambda _: (False, "timed out"))
    assert arguments == [setup.TORCH]
    assert "timed out" in reason


@pytest.mark.parametrize(("extras", "system"), [(["gpu"], "Linux"), (["cpu"], "Darwin")])
def test_index_is_not_asked_where_the_plain_wheel_is_right(extras: list[str], system: str) -> None:
    def refuse(url: str) -> tuple[bool, str]:
        raise AssertionError(url)

    assert setup.choose_torch(extras, system, refuse)[0] == [setup.TORCH]


def test_old_python_is_named_with_a_way_out() -> None:
    with pytest.raises(setup.SetupError, match=r"Python 3\.9\.2") as caught:
        setup.require_python((3, 9, 2), "/usr/bin/python3", ["python3.12"])
    assert "PYTHON=python3.12" in str(caught.value)
    with pytest.raises(setup.SetupError, match=r"install Python 3\.11"):
        setup.require_python((3, 9, 2), "/usr/bin/python3", [])
    setup.require_python((3, 11, 0), "python3", [])


def test_missing_ensurepip_names_the_debian_package() -> None:
    with pytest.raises(setup.SetupError, match=r"apt-get install python3\.\d+-venv"):
        setup.require_venv(lambda name: name != "ensurepip")
    setup.require_venv(lambda _: True)


def test_gpu_needs_a_working_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    assert setup.probe_gpu() == NO_GPU
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771, 580.1'\n")
    program.chmod(0o755)
    assert setup.probe_gpu() == (True, "nvidia-smi lists GPU 0: NVIDIA H200")
    program.write_text("#!/bin/sh\necho 'cannot talk to the driver' >&2; exit 9\n")
    works, reason = setup.probe_gpu()
    assert not works
    assert "cannot talk to the driver" in reason


def test_first_run_installs_torch_then_the_project_then_the_model(
    project: Path, commands: list[list[str]]
) -> None:
    setup.set_up(project, [], verbose=False)
    torch, package, model = commands
    assert torch[-1] == setup.TORCH
    assert package[-1] == f"{project}[cpu,rtx,serve,recover]"
    assert model[-2:] == ["--no-deps", setup.DEFAULT_MODEL]
    assert setup.read_stamp(project)["extras"] == ["cpu", "rtx", *VERBS]


def test_second_run_does_nothing(project: Path, commands: list[list[str]]) -> None:
    setup.set_up(project, [], verbose=False)
    commands.clear()
    setup.set_up(project, [], verbose=False)
    assert commands == []


def test_further_extras_are_added_and_remembered(project: Path, commands: list[list[str]]) -> None:
    setup.set_up(project, ["hub"], verbose=False)
    commands.clear()
    setup.set_up(project, [], verbose=False)
    setup.set_up(project, ["hub"], verbose=False)
    assert commands == []


def test_change_of_pyproject_installs_again_and_keeps_extras(
    project: Path, commands: list[list[str]]
) -> None:
    setup.set_up(project, ["hub"], verbose=False)
    commands.clear()
    (project / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    setup.set_up(project, [], verbose=False)
    assert commands
    assert "hub" in commands[1][-1]


def test_moved_project_is_not_taken_for_complete(
    project: Path, commands: list[list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    setup.set_up(project, [], verbose=False)
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    project.rename(moved)
    assert not setup.is_complete(moved, setup.read_stamp(moved), [])


def test_interruption_leaves_no_stamp_and_exits_130(
    project: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.set_up(project, [], verbose=False)

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "run_step", interrupt)
    monkeypatch.setattr(setup, "ROOT", project)
    (project / "pyproject.toml").write_text("changed")
    assert setup.main([]) == setup.INTERRUPTED
    assert not setup.stamp_path(project).exists()


def test_switch_between_cpu_and_gpu_replaces_the_environment(project: Path) -> None:
    choice = setup.Choice(("gpu", "dev"), "a test")
    reason = setup.reason_to_replace(setup.venv_python(project), choice, {"extras": ["cpu", "dev"]})
    assert reason is not None
    assert "clash" in reason


def test_new_choice_of_accelerator_replaces_the_remembered_one() -> None:
    stamp: dict[str, object] = {"requested": ["cpu", "hub"]}
    assert setup.remembered(stamp, ["gpu"]) == ["hub", "gpu"]
    assert setup.remembered(stamp, ["trt"]) == ["cpu", "hub", "trt"]


def test_damaged_stamp_counts_as_none(project: Path) -> None:
    setup.stamp_path(project).write_text("{half")
    assert setup.read_stamp(project) == {}


@pytest.mark.parametrize(
    ("output", "advice", "status"),
    [
        ("ERROR: [Errno 28] No space left on device", "disk space", 4),
        ("Temporary failure in name resolution", "check the network", 1),
        ("tensorrt_cu13_libs\nerror: metadata-generation-failed", "EXTRAS=gpu", 1),
        ("something else", "VERBOSE=1", 1),
    ],
)
def test_failure_shows_the_last_lines_and_what_to_do(output: str, advice: str, status: int) -> None:
    lines = "\n".join([*(f"line {number}" for number in range(50)), output])
    error = setup.explain_failure(["pip", "install"], 1, lines)
    assert output.splitlines()[-1] in str(error)
    assert "line 10\n" not in str(error)
    assert advice in str(error)
    assert error.exit_status == status


def test_failing_step_raises_with_its_output() -> None:
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(setup.SetupError, match="the reason"):
        setup.run_step("a step", command, verbose=False)


def test_script_needs_nothing_but_the_standard_library() -> None:
    script = Path(setup.__file__)
    command = [sys.executable, "-I", "-S", str(script), "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
