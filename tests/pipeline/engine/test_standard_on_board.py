"""Engines of standard TensorRT built on the fake board: by workers, or executed in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine import build, standard
from pipeline.engine.build import build_engine, run_plan
from pipeline.engine.plan import EngineRequest, plan_engine
from pipeline.engine.target import Target
from pipeline.engine.worker_protocol import TIMING_CACHE_FILE
from pipeline.errors import InputError, ResourceError
from pipeline.gpu import ORIN
from tests.support.fake_gpu.board import Board, board

__all__ = ["board"]
REQUEST = EngineRequest(Target("tensorrt", ORIN, "a test"))
MEBIBYTE = 1 << 20


def test_the_process_that_builds_does_not_read_the_plan_back(
    board: Board, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt  # type: ignore[import-not-found]

    def refuse(*_: Any) -> None:
        raise AssertionError("the builder is alive, and its weights are in memory")

    monkeypatch.setattr(tensorrt.Runtime, "deserialize_cuda_engine", refuse)
    result = standard.build(plan_engine(tiny_export, REQUEST).work, tmp_path)
    assert result.engine_layers == {}
    assert result.block_skip == {"path": "function body", "nodes": 2}


def test_another_process_reads_it_back_and_leaves_one_log(
    board: Board, tiny_export: Path, tmp_path: Path
) -> None:
    manifest = build_engine(tiny_export, tmp_path / "engine", REQUEST)
    layers = manifest["engine_layers"]
    assert (layers["readable"], layers["types"]) == (True, {"fake": 1})
    names = {"engine.plan", "manifest.json", "build.log", TIMING_CACHE_FILE}
    assert {path.name for path in (tmp_path / "engine").iterdir()} == names


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("raise SystemExit(1)", "ended with 1"),
        ("import time; time.sleep(60)", "too long"),
    ],
)
def test_an_engine_stays_whatever_becomes_of_the_process_that_reads_it(
    program: str, why: str, board: Board, tiny_export: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real = build.run_to_end

    def run(command: list[str], log: Path, timeout_s: float) -> Any:
        if command[-1] == "inspect":
            command, timeout_s = [sys.executable, "-c", program], min(timeout_s, 2.0)
        return real(command, log, timeout_s)

    monkeypatch.setattr(build, "run_to_end", run)
    manifest = build_engine(tiny_export, tmp_path / "engine", REQUEST)
    assert manifest["engine_layers"]["readable"] is False
    assert why in manifest["engine_layers"]["why"]
    assert (tmp_path / "engine" / "engine.plan").is_file()


def test_a_second_build_takes_the_timings_of_the_first_unless_they_are_of_another_version(
    board: Board, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "engine"
    said = [build_engine(tiny_export, folder, REQUEST)["notes"]]
    assert (folder / TIMING_CACHE_FILE).read_text() == "timings of 10.16.1.11"
    said.append(build_engine(tiny_export, folder, REQUEST, overwrite=True)["notes"])
    monkeypatch.setenv("FAKE_TENSORRT", "10.15.1")
    said.append(build_engine(tiny_export, folder, REQUEST, overwrite=True)["notes"])
    found = [[note for note in notes if "timings" in note] for notes in said]
    assert found[0] == []
    assert "those of the build before" in found[1][0]
    assert "another TensorRT" in found[2][0]
    assert (folder / TIMING_CACHE_FILE).read_text() == "timings of 10.15.1"


def test_where_memory_is_shared_weights_are_stored_once_and_scratch_memory_is_limited(
    board: Board, tiny_export: Path
) -> None:
    plan = plan_engine(tiny_export, REQUEST)
    assert plan.limits.decode == "shared"
    assert plan.work.shared_weights
    limit = plan.work.workspace_bytes
    assert limit is not None
    assert limit % MEBIBYTE == 0
    assert any(f"at most {limit // MEBIBYTE} MiB" in note for note in plan.notes)
    discrete = EngineRequest(Target("tensorrt", (9, 0), "a test"))
    elsewhere = plan_engine(tiny_export, discrete)
    assert (elsewhere.limits.decode, elsewhere.work.workspace_bytes) == ("separate", None)
    own = EngineRequest(REQUEST.target, workspace_bytes=MEBIBYTE, decode="separate")
    chosen = plan_engine(tiny_export, own)
    assert (chosen.limits.decode, chosen.work.workspace_bytes) == ("separate", MEBIBYTE)


@pytest.mark.parametrize(
    ("available", "swap", "advice"),
    [(10**12, 0, None), (10**8, 10**12, None), (221_000_000, 0, "add 2 GB of swap")],
)
def test_the_expected_peak_is_said_first_with_the_swap_that_helps(
    available: int, swap: int, advice: str | None, board: Board, tiny_export: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(available=available))
    monkeypatch.setattr(psutil, "swap_memory", lambda: memory(free=swap))
    first, *others = plan_engine(tiny_export, REQUEST).notes
    assert first.startswith("building takes about 0.2 GB of memory")
    assert (advice in first) if advice else ("swap" not in first)
    assert not any("swap" in note for note in others)


def test_what_cannot_hold_weights_and_plan_is_refused_with_the_swap_that_helps(
    board: Board, tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(available=10**8))
    monkeypatch.setattr(psutil, "swap_memory", lambda: memory(free=10**7))
    with pytest.raises(ResourceError, match="add 2 GB of swap") as refused:
        build_engine(tiny_export, tmp_path / "engine", REQUEST)
    assert refused.value.exit_status == 4
    assert not (tmp_path / "engine").exists()


def memory(**fields: int) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**fields)


def test_a_plan_that_was_built_in_the_same_way_is_adopted(
    board: Board, tiny_export: Path, tmp_path: Path
) -> None:
    build_engine(tiny_export, tmp_path / "first", REQUEST)
    plan = plan_engine(tiny_export, REQUEST)
    made = tmp_path / "first" / "engine.plan"
    manifest = run_plan(plan, tmp_path / "second", adopted=made)
    assert (tmp_path / "second" / "engine.plan").read_bytes() == made.read_bytes()
    assert manifest["engine_layers"]["readable"]
    assert manifest["block_skip"]["path"] == "function body"
    assert any("adopted" in note for note in manifest["notes"])
    assert not (tmp_path / "second" / TIMING_CACHE_FILE).exists()


def test_a_plan_of_other_shapes_and_no_plan_are_not_adopted(
    board: Board, tiny_export: Path, tmp_path: Path
) -> None:
    build_engine(tiny_export, tmp_path / "first", REQUEST)
    made = tmp_path / "first" / "engine.plan"
    smaller = EngineRequest(REQUEST.target, max_prefill=4)
    for request in (smaller, EngineRequest(REQUEST.target, max_prefill=1)):
        with pytest.raises(InputError, match="other shapes"):
            run_plan(plan_engine(tiny_export, request), tmp_path / "second", adopted=made)
    (tmp_path / "none.plan").write_bytes(b"nothing")
    plan = plan_engine(tiny_export, REQUEST)
    with pytest.raises(InputError, match="cannot be read"):
        run_plan(plan, tmp_path / "second", adopted=tmp_path / "none.plan")
    assert not (tmp_path / "second").exists()
