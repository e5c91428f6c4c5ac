"""The block-skip kernels on a GPU: every figure of their targets, by one command.

python -m benchmarks.gpu.block_skip_speed                  # on a GPU: some minutes; writes the JSON
python -m benchmarks.gpu.block_skip_speed --dry-run        # anywhere: layers, bytes and bounds
python -m benchmarks.gpu.block_skip_speed --device cpu     # tiny layers, emulated

    error      random layers of every type, width and tactic against float64, fresh every run
    decode     1 row of the linear layers of 1B to 70B models: against the copy bandwidth of the
               same run, dense cuBLAS, the unfused gather + product + add + product, and our int4
    prefill    2048 rows against two cuBLAS products
    sanitizer  memcheck and racecheck, where compute-sanitizer is installed

Ways take turns; a time is the median of rounds, each one replay of a CUDA graph of many calls over
several copies of the weights, three times the cache together. Ours is the fastest of four tactics,
as TensorRT would choose; the JSON has all of them.
"""

from __future__ import annotations

import secrets
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.gpu.block_skip_layer import BOUNDS, Kernels, Layer, measure_errors
from benchmarks.gpu.block_skip_ways import Stopwatch, Way, dense_way, our_ways, unfused_way
from pipeline.artefact import write_json
from pipeline.bench.bandwidth import DeviceMemory, HostMemory
from pipeline.bench.measure import describe_machine
from pipeline.bench.shapes import Shape, find_shape
from pipeline.child_process import environment
from pipeline.compress.plan.plan import rank_for_kept
from pipeline.provenance import provenance

_RESULT = RESULTS / "block_skip_speed.json"
_MODELS = ("llama-3.2-1b", "qwen3-4b", "llama-3.1-8b", "llama-3.1-70b")
_TINY = Shape("llama", 64, 128, 1, 4, 2, 16, 256, True, 512)
# int4 rows are read 8 bytes at a time where r and m are multiples of this.
_RANK_MULTIPLE = 16
_PREFILL_ROWS = 2048
# Below this a call is over before the memory is busy: shown, not judged.
_JUDGED_BYTES = 32_000_000
_LEAST = {
    "share of the copy bandwidth": 0.85,
    "over dense cuBLAS, of the bytes' ratio": 0.9,
    "over unfused": 1.3,
    "int4 over 16 bits": 2.8,
    "prefill over two cuBLAS products": 0.95,
}
_H200_BYTES_PER_S = 4.3e12  # a device copy, read and written bytes


def _layers_of(shape: Shape, kept: float) -> dict[str, Layer]:
    """The layers of a decoder that share an input, stacked, at a kept fraction."""
    inner = shape.heads * shape.head_dim
    sizes = {
        "qkv": (inner + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        "o": (shape.hidden, inner),
        "gate, up": (2 * shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }
    return {
        name: Layer(1, n, m, rank_for_kept("skip", m, n, kept, _RANK_MULTIPLE))
        for name, (m, n) in sizes.items()
    }


def _best(ways: list[Way], start: str) -> Way:
    """The way of least median time among those whose name starts so."""
    chosen = [way for way in ways if way.name.startswith(start)]
    return min(chosen, key=lambda way: statistics.median(way.us))


def _ratio(slow: Way, fast: Way) -> float:
    return statistics.median(slow.us) / statistics.median(fast.us)


def _verdict(claim: str, observed: float, judged: bool) -> dict[str, Any]:
    """One claim beside what it asks."""
    passed = "pass" if observed >= _LEAST[claim] else "missed"
    return {
        "claim": claim,
        "observed": observed,
        "least": _LEAST[claim],
        "verdict": passed if judged else "not judged",
    }


def _way_record(way: Way) -> dict[str, Any]:
    median = statistics.median(way.us)
    return {
        "way": way.name,
        "read_bytes": way.read_bytes,
        "us": median,
        "spread_us": [min(way.us), max(way.us)],
        "gb_per_s": way.read_bytes / median / 1e3,
    }


def _decode_row(
    kernels: Kernels, layer: Layer, watch: Stopwatch, random: torch.Generator, bytes_per_s: float
) -> dict[str, Any]:
    """One row of one layer by every way, judged."""
    ways, errors = [], {}
    for bits in (16, 8, 4):
        ours, error = our_ways(kernels, replace(layer, bits=bits), watch, random)
        errors[f"{bits} bits"] = error
        ways += ours
    ways += [dense_way(layer, watch, random), unfused_way(layer, watch, random)]
    watch.time(ways)
    fp16, dense = _best(ways, "16 bits"), _best(ways, "dense")
    bytes_ratio = layer.dense_bytes() / layer.weight_bytes()
    over_dense = _ratio(dense, fp16) / bytes_ratio
    share = fp16.read_bytes / statistics.median(fp16.us) * 1e6 / bytes_per_s
    judged = watch.where == "cuda" and layer.weight_bytes() >= _JUDGED_BYTES
    verdicts = [
        _verdict("share of the copy bandwidth", share, judged),
        _verdict("over dense cuBLAS, of the bytes' ratio", over_dense, judged),
        _verdict("over unfused", _ratio(_best(ways, "gather"), fp16), judged),
        _verdict("int4 over 16 bits", _ratio(fp16, _best(ways, "4 bits")), judged),
    ]
    return _row_record(layer, ways, errors, verdicts)


def _prefill_row(
    kernels: Kernels, layer: Layer, watch: Stopwatch, random: torch.Generator
) -> dict[str, Any]:
    """Many rows of one layer, in order, against two products."""
    ours, error = our_ways(kernels, layer, watch, random)
    # Tactics cut the decode step alone.
    ways = [ours[0], unfused_way(layer, watch, random)]
    watch.time(ways)
    claim = "prefill over two cuBLAS products"
    verdicts = [_verdict(claim, _ratio(_best(ways, "two"), ours[0]), watch.where == "cuda")]
    record = _row_record(layer, ways, {"16 bits": error}, verdicts)
    flop = 2 * layer.rows * layer.rank * (layer.m + layer.n - layer.rank)
    record["tflops"] = flop / statistics.median(ours[0].us) / 1e6
    return record


def _row_record(
    layer: Layer, ways: list[Way], errors: dict[str, float], verdicts: list[dict[str, Any]]
) -> dict[str, Any]:
    sizes = {"rows": layer.rows, "n": layer.n, "m": layer.m, "rank": layer.rank}
    bound = BOUNDS[layer.dtype]
    return {
        **sizes,
        "kept_bytes": layer.weight_bytes(),
        "dense_bytes": layer.dense_bytes(),
        "errors": errors,
        "error_verdict": "pass" if all(e <= bound for e in errors.values()) else "missed",
        "ways": [_way_record(way) for way in ways],
        "verdicts": verdicts,
    }


def _sanitize(device: str, cases: int) -> list[dict[str, Any]]:
    """Memcheck and racecheck over random layers, or why they were not run."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if device == "cpu" or program is None:
        why = "no GPU" if device == "cpu" else "compute-sanitizer is not installed"
        return [{"tool": tool, "verdict": "not run", "why": why} for tool in _SANITIZERS]
    rows = []
    for tool in _SANITIZERS:
        # PyTorch asks the driver things that it may refuse: those are no errors of a kernel.
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command += [sys.executable, "-m", "benchmarks.gpu.block_skip_layer", "--cases", str(cases)]
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment()
        )
        clean = answer.returncode == 0
        row = {"tool": tool, "cases": cases, "verdict": "pass" if clean else "missed"}
        rows.append(row if clean else row | {"output": (answer.stdout + answer.stderr)[-4000:]})
    return rows


_SANITIZERS = ("memcheck", "racecheck")


def _chosen_layers(models: str, kept: float) -> dict[str, Layer]:
    """Layers by "model, layer", of published shapes or of `tiny`."""
    return {
        f"{model}, {name}": layer
        for model in models.split(",")
        for name, layer in _layers_of(_TINY if model == "tiny" else find_shape(model), kept).items()
    }


def _show_plan(layers: dict[str, Layer]) -> None:
    """What would be measured, and the least time of each layer."""
    click.echo(f"{'layer':<26} rows      n      m      r  dense MB  kept MB  int4 MB    us")
    for name, layer in layers.items():
        four = replace(layer, bits=4).weight_bytes()
        sizes = f"{layer.rows:4} {layer.n:6} {layer.m:6} {layer.rank:6}"
        mega = (
            f"{layer.dense_bytes() / 1e6:9.1f} {layer.weight_bytes() / 1e6:8.1f} {four / 1e6:8.1f}"
        )
        bound = layer.weight_bytes() / _H200_BYTES_PER_S * 1e6
        judged = "" if layer.weight_bytes() >= _JUDGED_BYTES else "  not judged"
        click.echo(f"{name:<26} {sizes} {mega} {bound:5.1f}{judged}")
    click.echo("us: the kept bytes at an H200's 4.3 TB/s. Targets, each at least:")
    for claim, least in _LEAST.items():
        click.echo(f"  {claim}: {least}")
    click.echo("  error: at most 1e-3 (float16), 1e-2 (bfloat16)")
    click.echo(f"  {' and '.join(_SANITIZERS)}: clean. Nothing was timed.")


def _show_row(name: str, row: dict[str, Any]) -> None:
    """A layer's verdicts, one to a line."""
    click.echo(f"{name}, {row['rows']} rows, {row['kept_bytes'] / 1e6:.1f} MB")
    worst = max(row["errors"].values())
    click.echo(f"  {'error':<40} {worst:8.1e}         {row['error_verdict']}")
    for item in row["verdicts"]:
        numbers = f"{item['observed']:8.2f}  of {item['least']:<4}"
        click.echo(f"  {item['claim']:<40} {numbers} {item['verdict']}")


def _measure_all(
    device: str, layers: dict[str, Layer], rows: int, rounds: int, cases: int, seed: int
) -> dict[str, Any]:
    """Every figure, shown as it comes."""
    kernels = Kernels(device)
    memory = DeviceMemory() if device == "cuda" else HostMemory(2)
    watch = Stopwatch(device, rounds)
    random = torch.Generator(device).manual_seed(seed)
    errors = measure_errors(kernels, cases, seed)
    errors["verdict"] = "missed" if errors["beyond"] else "pass"
    click.echo(f"errors of {cases} random layers, seed {seed}: {errors['verdict']}")
    bytes_per_s = max(memory.read() for _ in range(3))
    click.echo(f"{memory.name}: {bytes_per_s / 1e9:.0f} GB/s")
    decode, prefill = {}, {}
    for name, layer in layers.items():
        decode[name] = _decode_row(kernels, layer, watch, random, bytes_per_s)
        _show_row(name, decode[name])
    for name, layer in layers.items():
        many = replace(layer, rows=rows, indexed=False)
        prefill[name] = _prefill_row(kernels, many, watch, random)
        _show_row(name, prefill[name])
    sanitizer = _sanitize(device, max(1, cases // 10))
    for row in sanitizer:
        click.echo(f"{row['tool']}: {row['verdict']} {row.get('why', '')}")
    return {
        "errors": errors, "bandwidth": {"of": memory.name, "bytes_per_s": bytes_per_s},
        "decode": decode, "prefill": prefill, "sanitizer": sanitizer,
    }  # fmt: skip


@click.command()
@click.option("--models", help=f"Shapes; by default {','.join(_MODELS)}, tiny on the CPU.")
@click.option("--kept", type=click.FloatRange(0.05, 1), default=0.6, show_default=True)
@click.option("--rows", type=click.IntRange(9, 4096), help="Of prefill; 2048, 16 on the CPU.")
@click.option("--rounds", type=click.IntRange(min=1), help="By default 15, 2 on the CPU.")
@click.option("--cases", type=click.IntRange(min=1), help="Random layers; 300, 20 on the CPU.")
@click.option("--seed", type=int, help="By default a fresh one.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--dry-run", is_flag=True, help="Layers, bytes and bounds; nothing is timed.")
@click.option("--json", "result", type=click.Path(path_type=Path), help=f"By default {_RESULT}.")
def command(
    models: str | None,
    kept: float,
    rows: int | None,
    rounds: int | None,
    cases: int | None,
    seed: int | None,
    device: str,
    dry_run: bool,
    result: Path | None,
) -> None:
    """Measure every figure, print the verdicts, and write the JSON."""
    on_cpu = device == "cpu"
    layers = _chosen_layers(models or ("tiny" if on_cpu else ",".join(_MODELS)), kept)
    if dry_run:
        _show_plan(layers)
        return
    if not on_cpu and not torch.cuda.is_available():
        raise click.ClickException("PyTorch sees no GPU; --dry-run and --device cpu need none")
    chosen = secrets.randbelow(1 << 31) if seed is None else seed
    found = _measure_all(
        device,
        layers,
        rows or (16 if on_cpu else _PREFILL_ROWS),
        rounds or (2 if on_cpu else 15),
        cases or (20 if on_cpu else 300),
        chosen,
    )
    record = {
        "machine": describe_machine(),
        "gpu": None if on_cpu else torch.cuda.get_device_name(),
        "provenance": provenance(),
        "device": device,
        "kept": kept,
        **found,
    }
    if result or not on_cpu:
        write_json(result or _RESULT, record)
    else:
        click.echo("On the CPU times mean nothing; nothing was written (--json writes it).")


if __name__ == "__main__":
    sys.exit(run(command))
