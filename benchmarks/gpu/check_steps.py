"""Steps that run other programs: memory and race checkers, the plugin's harness, tests of GPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import Row, Setting, not_run, outcome
from pipeline.child_process import environment

_ROOT = Path(__file__).resolve().parents[2]
_HARNESS = _ROOT / "build" / "plugin" / "tree" / "harness"
_PLUGIN = _ROOT / "trt_plugins" / "block_skip" / "lib" / "libskipcat_block_skip.so"
_GPU_TESTS = (
    "tests/pipeline/kernels",
    "tests/pipeline/runtime/sessions/test_static_session.py",
    "tests/pipeline/runtime/device/test_driver.py",
    "tests/pipeline/runtime/offload/test_cuda_device.py",
)
_SHOWN = 3000
_LAYER_CASES = 12
_ENDING_S = 3.0  # so that what a program printed is read before the step is ended


def memcheck(setting: Setting) -> Iterator[Row]:
    """Random layers under compute-sanitizer, which finds accesses beside memory."""
    # PyTorch asks the driver things that it may refuse: those are no errors of a kernel.
    yield from _sanitized(setting, "memcheck", ["--report-api-errors", "no"])


def racecheck(setting: Setting) -> Iterator[Row]:
    """Random layers under compute-sanitizer, which finds races in shared memory."""
    yield from _sanitized(setting, "racecheck", [])


def _sanitized(setting: Setting, tool: str, flags: list[str]) -> Iterator[Row]:
    """The same layers as `errors`, few of them; on the CPU without the checker."""
    if "layers" in setting.done:
        return
    cases = _LAYER_CASES if setting.on_gpu else 3
    layers = [sys.executable, "-m", "benchmarks.gpu.block_skip_layer", "--cases", str(cases)]
    layers += ["--seed", str(setting.seed), "--device", setting.device]
    claim = f"{tool} of random layers: clean"
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if setting.on_gpu and found:
        layers = [found, "--tool", tool, "--error-exitcode", "9", *flags, *layers]
    ended = _run(layers, setting)
    checked = setting.on_gpu and found is not None
    why = "no GPU" if not setting.on_gpu else "compute-sanitizer is not installed"
    verdicts = [_judged(claim, ended) if checked else not_run(claim, why)]
    if not checked:  # the layers themselves ran
        verdicts.append(_judged("the layers without it", ended))
    yield "layers", {"cases": cases, "verdicts": verdicts}


def harness(setting: Setting) -> Iterator[Row]:
    """The plugin library in the harness: on a GPU enqueue, contexts, graphs, and latents."""
    claim = "the harness finds no fault in the plugin"
    if "plugin" in setting.done:
        return
    if not (_HARNESS.is_file() and _PLUGIN.is_file()):
        why = "no harness was carried along: make it by --prepare"
        yield "plugin", {"verdicts": [not_run(claim, why)]}
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _HARNESS.chmod(0o755)
        ended = _run([str(_HARNESS), str(_PLUGIN), "--json", str(report)], setting)
        told = json.loads(report.read_text()) if report.is_file() else {}
    checks = {"checks": len(told.get("checks", [])), "failures": told.get("failures")}
    yield "plugin", {**checks, "verdicts": [_judged(claim, ended)]}


def gpu_tests(setting: Setting) -> Iterator[Row]:
    """Tests marked `gpu`; on the CPU they are collected alone."""
    if "tests" in setting.done:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", *_GPU_TESTS, *([] if setting.on_gpu else ["--collect-only"])]
    ended = _run(command, setting)
    last = (ended["output"].strip().splitlines() or [""])[-1]
    yield "tests", {"says": last, "verdicts": [_judged("tests of GPUs pass", ended)]}


def _run(command: Sequence[str], setting: Setting) -> dict[str, Any]:
    """A program to its end, or that of the step: its status and the end of what it printed."""
    try:
        answer = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env=environment(), cwd=_ROOT, timeout=max(1.0, setting.left_s - _ENDING_S),
        )  # fmt: skip
    except subprocess.TimeoutExpired as over:
        printed = over.output or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return {"status": None, "output": text[-_SHOWN:]}
    return {"status": answer.returncode, "output": answer.stdout[-_SHOWN:]}


def _judged(claim: str, ended: dict[str, Any]) -> dict[str, Any]:
    """What a program found; what it printed is kept where it is not good."""
    if ended["status"] is None:
        return not_run(claim, "not at its end in time") | {"output": ended["output"]}
    good = ended["status"] == 0
    return outcome(claim, good, **({} if good else ended))
