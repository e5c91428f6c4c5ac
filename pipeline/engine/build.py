"""`build_engine`: an ONNX folder in, an engine folder with its manifest out.

Every way the worker process can end becomes a result or an explained error.
"""

from __future__ import annotations

import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artefact import staged_folder, write_json, write_text
from pipeline.child_process import ChildEnd, run_to_end
from pipeline.engine.manifest import MANIFEST_FILE, make_manifest
from pipeline.engine.network import OUT_OF_MEMORY_WORDS
from pipeline.engine.plan import EnginePlan, EngineRequest, plan_engine
from pipeline.engine.profiles import DecodeForm
from pipeline.engine.worker_protocol import (
    INSPECT,
    LAYERS_FILE,
    PLAN_FILE,
    REQUEST_FILE,
    RESULT_FILE,
    TIMING_CACHE_FILE,
    WorkerResult,
)
from pipeline.errors import InputError, PipelineError, ResourceError, UsageError
from pipeline.json_file import read_json_object
from pipeline.output import check_output
from pipeline.provenance import public_text
from pipeline.tokenizer_files import copy_tokenizer

# Measured on SmolLM2-135M with TensorRT for RTX 1.7, see docs/engine-size.md.
_PLAN_PER_WEIGHT: dict[DecodeForm, float] = {"shared": 1.2, "separate": 2.1}
_LOG_FILE, _INSPECTION_LOG_FILE = "build.log", "inspection.log"
_TAIL_LINES = 12
_TAIL_LINE_CHARACTERS = 400
_ERRORS_BY_STATUS = {3: InputError, 4: ResourceError}


def build_engine(
    onnx_folder: Path, output: Path, request: EngineRequest, *, overwrite: bool = False
) -> dict[str, Any]:
    """Build a TensorRT engine out of an exported ONNX folder.

    Args:
        onnx_folder: what `skipcat export --dtype float16` wrote.
        output: folder to write: `engine.plan`, `manifest.json`, `build.log`.
        request: the target, and what the engine must be able to run.
        overwrite: replace `output` if it exists.

    Returns:
        The manifest.

    Raises:
        InputError: the folder, plugin or graph is refused.
        MissingPackageError: the TensorRT flavour is not installed.
        ResourceError: memory, disk or time ran out.
        UsageError: `output` exists, a limit is below 1, or the target needs no engine.
    """
    check_output(output, overwrite=overwrite, inputs=(onnx_folder, request.plugin or ""))
    plan = plan_engine(onnx_folder, request)
    return run_plan(plan, output, overwrite=overwrite)


def run_plan(
    plan: EnginePlan, output: Path, *, overwrite: bool = False, adopted: Path | None = None
) -> dict[str, Any]:
    """Run the worker on a plan and write the engine folder; its manifest.

    Args:
        plan: what was decided.
        output: folder to write; the timings in the one that is replaced are used again.
        overwrite: replace `output` if it exists.
        adopted: a plan that another program built in that way, to be taken instead of building.

    Raises:
        InputError: TensorRT refuses the plugin or graph, or what is adopted is another engine.
        ResourceError: memory, disk or time ran out.
        UsageError: `output` exists, or a plan of TensorRT for RTX is to be adopted.
    """
    if adopted is not None and plan.target.flavour != "tensorrt":
        raise UsageError(
            "Only plans of standard TensorRT are adopted: others cannot be read back to compare.",
            where=adopted,
            observed=f"target {plan.target}",
            change="build it here, without --adopt",
        )
    required = int(plan.folder.weight_bytes * _PLAN_PER_WEIGHT[plan.limits.decode])
    inputs = (plan.folder.path, plan.work.plugin or "", adopted or "")
    timings = output.resolve() / TIMING_CACHE_FILE
    work = replace(
        plan.work,
        timing_cache=timings if timings.is_file() else None,
        adopted=adopted is not None,
    )
    with staged_folder(
        output, overwrite=overwrite, inputs=inputs, required_bytes=required
    ) as staging:
        if adopted is not None:
            shutil.copyfile(adopted, staging / PLAN_FILE)
        request_path = staging.resolve() / REQUEST_FILE
        write_json(request_path, work.to_json())
        end = run_to_end(_worker_command(request_path), staging / _LOG_FILE, plan.timeout_s)
        result = _read_result(end, staging, plan.timeout_s)
        if not result.engine_layers:
            layers = _inspect(request_path, plan.timeout_s, is_adopted=work.adopted)
            result = replace(result, engine_layers=layers)
        if plan.work.plugin is not None:
            # The engine cannot be loaded without it, so the folder carries it.
            shutil.copy(plan.work.plugin, staging)
        manifest = make_manifest(plan, result, staging)
        write_json(staging / MANIFEST_FILE, manifest)
        copy_tokenizer(plan.folder.path, staging)
        _tidy(staging)
    return manifest


def _tidy(staging: Path) -> None:
    """Leave one log, in which nothing tells of this machine's folders."""
    texts = []
    for name in (_LOG_FILE, _INSPECTION_LOG_FILE):
        path = staging / name
        if path.is_file():
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            path.unlink()
    write_text(staging / _LOG_FILE, public_text("".join(texts)))
    for name in (REQUEST_FILE, RESULT_FILE, LAYERS_FILE):
        (staging / name).unlink(missing_ok=True)


def _worker_command(request_path: Path) -> list[str]:
    """The command line of the worker."""
    return [sys.executable, "-m", "pipeline.engine.worker", str(request_path)]


def _inspect(request_path: Path, timeout_s: float, *, is_adopted: bool) -> dict[str, Any]:
    """What the plan beside a request holds, read by a fresh process: the builder's memory is free.

    Raises:
        InputError: it was adopted, and cannot be read or is not what was asked for. One that was
            built here is there to stay, whatever becomes of the process that reads it.
    """
    staging = request_path.parent
    command = [*_worker_command(request_path), INSPECT]
    end = run_to_end(command, staging / _INSPECTION_LOG_FILE, timeout_s)
    found = _read_answer(staging / LAYERS_FILE)
    if "readable" not in found:
        said = found.get("error", {"what": _ended(end)})
        if is_adopted and "error" in found:
            raise InputError(said["what"], **said["details"])
        found = {"readable": False, "why": said["what"]}
    if is_adopted and not found["readable"]:
        raise InputError(
            "The plan to adopt cannot be read.",
            observed=found["why"],
            change="build it on this machine, with the TensorRT that is installed here",
        )
    return found


def _ended(end: ChildEnd) -> str:
    """How the process that reads a plan back ended, when it left no answer."""
    if end.timed_out:
        return "reading the plan back took too long"
    name = f"signal {signal.Signals(-end.status).name}" if end.status < 0 else str(end.status)
    return f"the process that read the plan back ended with {name}; build.log says more"


def _read_result(end: ChildEnd, staging: Path, timeout_s: float) -> WorkerResult:
    """The worker's result.

    Raises:
        InputError: the worker refused the request, or the library aborted on the graph.
        PipelineError: the worker failed for a reason it does not know.
        ResourceError: memory or the time limit ran out.
    """
    log = _read_tail(staging / _LOG_FILE)
    if end.timed_out:
        raise ResourceError(
            "Building the engine took too long and was stopped.",
            observed=f"more than {timeout_s:.0f} s; last lines:\n{log}",
            change="give it more time with --timeout, or lower --max-prefill",
        )
    if end.status < 0:
        raise _killed_by(-end.status, log)
    answer = _read_answer(staging / RESULT_FILE)
    if end.status != 0 or "error" in answer:
        raise _refused(end.status, answer, log)
    answer["notes"] = tuple(answer["notes"])
    return WorkerResult(**answer)


def _read_answer(path: Path) -> dict[str, Any]:
    """The worker's JSON; empty when it wrote none."""
    return read_json_object(path) if path.is_file() else {}


def _refused(status: int, answer: dict[str, Any], log: str) -> PipelineError:
    """The worker's own error again, or one with the log when it left none."""
    kind = _ERRORS_BY_STATUS.get(status, PipelineError)
    error = answer.get("error")
    if error is None:
        return kind(
            f"The engine worker failed with status {status}.",
            observed=f"last lines of its log:\n{log}",
            change="please report this with the log",
        )
    return kind(error["what"], **error["details"])


def _killed_by(number: int, log: str) -> PipelineError:
    """The error for a worker that a signal ended."""
    name = signal.Signals(number).name
    observed = f"{name}; last lines of its log:\n{log}"
    out_of_memory = any(word in log.lower() for word in OUT_OF_MEMORY_WORDS)
    if number == signal.SIGKILL or out_of_memory:
        return ResourceError(
            "The engine worker was killed, most likely because memory ran out.",
            observed=observed,
            change="close other programs, add swap, or lower --max-batch and --max-prefill; "
            "`dmesg` says whether the kernel's out-of-memory killer did it",
        )
    return InputError(
        "TensorRT aborted while it built this graph.",
        observed=observed,
        change="export again (--profile compat), build without --plugin, or try another TensorRT "
        "version",
    )


def _read_tail(path: Path) -> str:
    """Last lines of a log, indented, long ones cut; empty when there is none."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    return "\n".join(f"    {line[:_TAIL_LINE_CHARACTERS]}" for line in lines)
