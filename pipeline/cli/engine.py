"""`skipcat engine ONNX_FOLDER -o ENGINE_FOLDER`: build a TensorRT engine."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli import options
from pipeline.errors import UsageError
from pipeline.export.contract import INPUT_IDS, PIXEL_VALUES

if TYPE_CHECKING:
    from pipeline.engine.plan import EnginePlan

_MEBIBYTE = 1 << 20

_limit_options = options.apply(
    options.setting("--max-batch", 1, "Most sequences at once.", options.positive),
    options.setting(
        "--max-prefill",
        1024,
        "Most tokens of one call; capped by the cache length.",
        options.positive,
    ),
    options.setting(
        "--decode",
        "auto",
        "Whether decoding shares the prefill's weights, or stores its own in another layout "
        "(a plan almost twice as large). auto: shared for RTX and on Jetsons, separate otherwise.",
        click.Choice(["auto", "shared", "separate"]),
    ),
    click.option(
        "--workspace",
        type=options.positive,
        metavar="MIB",
        help="Most scratch memory a kernel may use; if not given, TensorRT's default, or a quarter "
        "of what is free on a Jetson.",
    ),
    click.option(
        "--timeout",
        type=options.one_or_more,
        default=7200.0,
        show_default=True,
        metavar="SECONDS",
        help="Stop a build that takes longer.",
    ),
)


@click.command("engine")
@click.argument("onnx_folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@options.output
@options.setting(
    "--target",
    "auto",
    "GPU to build for: auto, tensorrt, orin, or a generation: sm86, 8.9, rtx:sm120. There is "
    "no engine for cpu, where ONNX Runtime runs the folder as it is.",
)
@click.option(
    "--plugin",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="LIB",
    help="Block-skip plugin library, for standard TensorRT; by default what `make plugin` built.",
)
@click.option(
    "--embed-kernels",
    is_flag=True,
    help="Compile the block-skip kernels into the engine, which then needs no plugin library; "
    "standard TensorRT 10.9 or newer.",
)
@_limit_options
@options.overwrite
@options.dry_run
@click.option(
    "--trtexec",
    is_flag=True,
    help="Build nothing; print the command of TensorRT's trtexec that builds the same plan, to be "
    "taken by --adopt. Not with --embed-kernels, --dry-run or --adopt, nor for RTX.",
)
@click.option(
    "--adopt",
    metavar="PLAN",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Build nothing; take a plan that the command of --trtexec built, with the same options. "
    "Not with --dry-run.",
)
@options.json_output
def command(
    onnx_folder: Path,
    output: Path,
    target: str,
    plugin: Path | None,
    embed_kernels: bool,
    max_batch: int,
    max_prefill: int,
    decode: str,
    workspace: int | None,
    timeout: float,
    overwrite: bool,
    dry_run: bool,
    trtexec: bool,
    adopt: Path | None,
    as_json: bool,
) -> None:
    """Build a TensorRT engine out of an exported ONNX folder (float16)."""
    if sum((dry_run, trtexec, adopt is not None)) > 1:
        raise UsageError("Take one of --dry-run, --trtexec and --adopt.")
    from pipeline.engine.build import run_plan
    from pipeline.engine.plan import EngineRequest, plan_engine
    from pipeline.engine.target import resolve_target
    from pipeline.output import check_output
    from pipeline.progress import note, waiting

    if not (dry_run or trtexec):
        inputs = (onnx_folder, plugin or "", adopt or "")
        check_output(output, overwrite=overwrite, inputs=inputs)
    chosen = resolve_target(target)
    note(f"target {chosen}: {chosen.reason}")
    request = EngineRequest(
        chosen,
        max_batch=max_batch,
        max_prefill=max_prefill,
        plugin=plugin,
        embed=embed_kernels,
        decode=None if decode == "auto" else decode,  # type: ignore[arg-type]
        workspace_bytes=None if workspace is None else workspace * _MEBIBYTE,
        timeout_s=timeout,
    )
    plan = plan_engine(onnx_folder, request)
    for line in plan.notes:
        note(line)
    if dry_run:
        _show(plan.to_json(), _plan_rows(plan), "Would build", as_json)
        return
    if trtexec:
        _print_trtexec(plan, output)
        return
    with waiting(f"{'building' if adopt is None else 'adopting'} {output.name} for {chosen}"):
        manifest = run_plan(plan, output, overwrite=overwrite, adopted=adopt)
    for line in manifest["notes"][len(plan.notes) :]:
        note(line)
    _show(manifest, _manifest_rows(manifest, output), "Engine", as_json)


def _print_trtexec(plan: EnginePlan, output: Path) -> None:
    """The command on stdout, and what to do with what it builds; its folder is there for it."""
    from pipeline.engine.trtexec import trtexec_command
    from pipeline.engine.worker_protocol import PLAN_FILE
    from pipeline.progress import note

    folder = output.absolute().with_name(f"{output.name}-trtexec")
    command = trtexec_command(plan, folder)
    print(f"mkdir -p {shlex.quote(str(folder))} && {shlex.join(command)}")
    note(f"then the same command as now, with --adopt {folder / PLAN_FILE} for --trtexec")


def _show(
    value: dict[str, Any], rows: Iterable[tuple[str, str]], title: str, as_json: bool
) -> None:
    """The result on stdout: JSON, or a short table."""
    if as_json:
        print(json.dumps(value, indent=2))
        return
    from rich.table import Table

    from pipeline.progress import result_console

    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    result_console().print(table)


def _plan_rows(plan: EnginePlan) -> list[tuple[str, str]]:
    """The table of `--dry-run`."""
    return [
        ("target", str(plan.target)),
        ("why", plan.target.reason),
        ("graph", f"{plan.folder.onnx_path}, {plan.folder.weight_bytes / _MEBIBYTE:.0f} MiB"),
        ("block-skip nodes", str(plan.folder.block_skip_nodes)),
        *([("nodes of codes", str(coded))] if (coded := plan.folder.coded_nodes) else []),
        (
            "plugin",
            str(plan.work.plugin or ("kernels in the engine" if plan.work.embed else "none")),
        ),
        *_context_rows(plan.limits.max_length),
        *_profile_rows([profile.to_json() for profile in plan.work.profiles]),
    ]


def _manifest_rows(manifest: dict[str, Any], output: Path) -> list[tuple[str, str]]:
    """The table of a finished build."""
    target, build, path = manifest["target"], manifest["build"], manifest["block_skip"]
    capability = "".join(map(str, target["compute_capability"]))
    return [
        ("folder", str(output)),
        ("target", f"{target['flavour']} {manifest['tensorrt_version']}, sm{capability}"),
        ("plan", f"{manifest['plan']['bytes'] / _MEBIBYTE:.0f} MiB"),
        ("block-skip", f"{path['path']}, {path['nodes']} nodes"),
        *_quantized_rows(manifest["few_bits"]),
        *_cache_rows(manifest.get("cache_write")),
        *_context_rows(manifest["limits"].get("max_length", 0)),
        *_profile_rows(manifest["profiles"]),
        ("built in", f"{build['parse_seconds'] + build['build_seconds']:.1f} s"),
        ("peak memory", f"{build['peak_memory_bytes'] / _MEBIBYTE:.0f} MiB"),
    ]


def _quantized_rows(few_bits: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of quantised matrices; none for a graph without them."""
    if not few_bits["matrices"]:
        return []
    by = ", by the plugin" if few_bits["path"] == "plugin" else ""
    return [("quantised", f"{few_bits['matrices']} matrices, read as codes{by}")]


def _cache_rows(written: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The row of a cache that our plugin writes; none of one that TensorRT keeps itself."""
    return [("cache", f"written in place by the {written['path']}")] if written else []


def _context_rows(max_length: int) -> list[tuple[str, str]]:
    """The row of the cache's length; none for a model that takes no tokens."""
    return [("context", f"{max_length} tokens")] if max_length else []


def _profile_rows(profiles: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One row for each profile: the range of tokens, or of images."""
    rows = []
    for profile in profiles:
        if PIXEL_VALUES in profile["shapes"]:
            images = profile["shapes"][PIXEL_VALUES]
            size = "x".join(map(str, images["max"][1:]))
            rows.append((profile["name"], f"{images['min'][0]}..{images['max'][0]} of {size}"))
            continue
        tokens = profile["shapes"][INPUT_IDS]
        text = (
            f"batch {tokens['min'][0]}..{tokens['max'][0]}, "
            f"tokens {tokens['min'][1]}..{tokens['max'][1]} (tuned for {tokens['opt'][1]})"
        )
        rows.append((profile["name"], text))
    return rows
