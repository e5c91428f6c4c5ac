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
    assert build_plugin.architectures(None) == "89-real;87-real;90"


def test_the_tool_needs_nothing_but_the_standard_library() -> None:
    command = [sys.executable, "-I", "-S", build_plugin.__file__, "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_resource_report_names_kernels_in_words() -> None:
    symbol = "_ZN7skipcat13decodeProductI6__halfLNS_10WeightTypeE4ELb1EEEvNS_15DecodeArgumentsIT_EE"
    log = (
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_87'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 126 registers, used 1 barriers, 448 bytes cmem[0]\n"
    )
    (row,) = build_plugin.read_resources(log)
    assert row["kernel"] == "decode"
    assert (row["x"], row["weights"], row["variant"]) == ("fp16", "int4", "16-byte loads")
    assert (row["gpu"], row["registers"], row["spill_bytes"]) == ("sm_87", 126, 16)


def test_a_failing_build_leaves_the_old_library(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / build_plugin.LIBRARY
    library.write_bytes(b"old")
    with pytest.raises(OSError, match=build_plugin.LIBRARY):
        build_plugin.deliver(tmp_path / "no-tree", tmp_path / "lib")
    assert library.read_bytes() == b"old"
