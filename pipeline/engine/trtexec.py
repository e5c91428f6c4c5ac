"""The command of trtexec that builds what a plan of ours says, to be adopted afterwards."""

from __future__ import annotations

from pathlib import Path

from pipeline.engine.plan import EnginePlan
from pipeline.engine.profiles import ShapeProfile
from pipeline.engine.standard import prefers_functions
from pipeline.engine.target import load_library
from pipeline.engine.worker_protocol import PLAN_FILE, TIMING_CACHE_FILE
from pipeline.errors import UsageError

_ENDS = ("min", "opt", "max")
_MEBIBYTE = 1 << 20


def trtexec_command(plan: EnginePlan, folder: Path) -> list[str]:
    """Program and arguments that build the engine of a plan into a folder.

    Args:
        plan: of standard TensorRT, whose parser can be given the graph as it is.
        folder: where its plan, and the timings of its kernels, are to lie.

    Raises:
        UsageError: trtexec cannot build this engine.
    """
    _require_as_it_is(plan)
    work = plan.work
    command = [
        "trtexec",
        f"--onnx={work.onnx_path}",
        "--stronglyTyped",
        "--profilingVerbosity=detailed",
        "--skipInference",
        f"--saveEngine={folder / PLAN_FILE}",
        f"--timingCacheFile={folder / TIMING_CACHE_FILE}",
    ]
    if work.workspace_bytes is not None:
        command.append(f"--memPoolSize=workspace:{work.workspace_bytes // _MEBIBYTE}M")
    if work.plugin is not None:
        command.append(f"--staticPlugins={work.plugin}")
    if work.writes_in_place:
        command.append("--preview=+aliasedPluginIO1003")
    for index, profile in enumerate(work.profiles):
        command += [f"--profile={index}", *_shapes(profile)]
    return command


def _shapes(profile: ShapeProfile) -> list[str]:
    """Smallest, tuned-for and largest shapes of all inputs, a flag each."""
    flags = []
    for end in _ENDS:
        specs = [
            f"{name}:{'x'.join(map(str, getattr(ends, end)))}"
            for name, ends in profile.shapes.items()
        ]
        flags.append(f"--{end}Shapes={','.join(specs)}")
    return flags


def _require_as_it_is(plan: EnginePlan) -> None:
    """Raise UsageError for an engine that comes from another graph than the exported one."""
    work, why = plan.work, ""
    if work.flavour != "tensorrt":
        why = "it is for TensorRT for RTX, which has no GPU to time kernels on"
    elif work.embed:
        why = "kernels that are compiled into the engine come from Python"
    elif work.coded_nodes and work.plugin is None:
        why = "its codes are rewritten for TensorRT's own operators"
    elif work.cache_nodes and work.plugin is None:
        why = "its cache is rewritten to grow, for lack of a plugin that writes it"
    elif work.plugin is not None:
        version = load_library("tensorrt", "ask for its version").__version__
        if prefers_functions(version):
            why = f"TensorRT {version} would prefer function bodies, which are removed for it"
    if why:
        raise UsageError(
            "trtexec cannot build this engine from the exported graph.",
            where="--trtexec",
            observed=why,
            change="build it without --trtexec, in a process of its own as well",
        )
