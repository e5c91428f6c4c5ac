"""What the tool that compiles the plugin compiles for, says, and leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.gpu import Gpu
from tools import build_plugin


def test_chosen_architectures_are_taken_as_they_are() -> None:
    assert build_plugin.architectures("86-real") == "86-real"
    assert build_plugin.architectures(None).endswith("87-real;90")


def test_gpus_that_are_here_and_not_covered_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [Gpu("", capability) for capability in ((8, 9), (9, 0), (7, 5), (8, 9))]
    monkeypatch.setattr(build_plugin, "find_gpus", lambda: (tuple(here), "a test"))
    monkeypatch.setattr(build_plugin, "find_gpu", lambda: here[0])
    assert build_plugin.architectures(None) == "89-real;87-real;90"


@pytest.mark.parametrize(("capability", "wanted"), [((8, 7), "87-real"), ((11, 0), "110-real")])
def test_a_jetson_compiles_for_itself_alone(
    capability: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_plugin, "find_gpu", lambda: Gpu("a Jetson", capability))
    assert build_plugin.architectures(None) == wanted
    assert build_plugin.architectures("90") == "90"


@pytest.mark.parametrize(("free_kib", "most"), [(9_000_000, 4), (1_000_000, 1), (0, 1)])
def test_no_more_files_are_compiled_at_once_than_memory_holds(
    free_kib: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal:  9 kB\nMemAvailable:   {free_kib} kB\n")
    assert build_plugin.parallel_jobs(meminfo) == most
    assert build_plugin.parallel_jobs(tmp_path / "none") == 64


def test_the_tool_needs_nothing_but_the_standard_library() -> None:
    command = [sys.executable, "-I", "-S", build_plugin.__file__, "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_resource_report_names_kernels_in_words() -> None:
    symbol = (
        "_ZN7skipcat13streamProductI6__halfLNS_10WeightTypeE4ELi16EEEvNS_15StreamArgumentsIT_EE"
    )
    log = (
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_87'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 126 registers, used 1 barriers, 448 bytes cmem[0]\n"
    )
    (row,) = build_plugin.read_resources(log)
    assert row["kernel"] == "decode"
    assert (row["x"], row["weights"], row["variant"]) == ("fp16", "int4", "copies of 16 bytes")
    assert (row["gpu"], row["registers"], row["spill_bytes"]) == ("sm_87", 126, 16)


def test_a_failing_build_leaves_the_old_library(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / build_plugin.LIBRARY
    library.write_bytes(b"old")
    with pytest.raises(OSError, match=build_plugin.LIBRARY):
        build_plugin.deliver(tmp_path / "no-tree", tmp_path / "lib")
    assert library.read_bytes() == b"old"
