"""The library of operators for the CPU: compiled once, or not had, and then it is said why."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.kernels import cpu_library as module
from pipeline.kernels.cpu_library import CHOICE, OFF, cpu_library, why_no_kernels

pytestmark = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cpu_library", cpu_library.__wrapped__)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    compiled: list[Path] = []

    def compile_(compiler: list[str], target: Path) -> None:
        compiled.append(target)
        target.write_bytes(b"")

    monkeypatch.setattr(module, "_compile", compile_)
    assert module.cpu_library() == module.cpu_library() == compiled[0]
    assert len(compiled) == 1


def test_another_compiler_makes_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._digest(["g++"]) != module._digest(["clang++"])
    before = module._digest(["g++"])
    monkeypatch.setattr(module, "_FLAGS", ("-O1",))
    assert module._digest(["g++"]) != before


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_leaves_the_bodies_and_no_file(
    compiler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    assert module.cpu_library() is None
    assert "ONNX Runtime's own kernels, which are slower" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert why_no_kernels() == "there is no C++ compiler (apt install g++)"


def test_the_bodies_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CHOICE, OFF)
    assert module.cpu_library() is None
    assert f"{CHOICE}={OFF}" in capsys.readouterr().err


def test_a_choice_of_another_architecture_runs_the_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(module, "cpu_flags", lambda: ("asimd", "asimddp"))
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv(CHOICE, "avx2")
    assert why_no_kernels() == f"{CHOICE}=avx2 is of another architecture than aarch64"
    monkeypatch.setenv(CHOICE, "neon")
    assert why_no_kernels() is None


def test_a_choice_of_no_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "avx1024")
    with pytest.raises(InputError, match="names no kernels"):
        why_no_kernels()


@pytest.mark.parametrize(
    ("platform", "machine", "flags"),
    [
        ("linux", "aarch64", ("asimd",)),
        ("win32", "x86_64", ("avx2",)),
        ("linux", "x86_64", ("sse4_2",)),
    ],
)
def test_other_processors_and_systems_run_the_bodies(
    platform: str, machine: str, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    assert why_no_kernels() is not None
